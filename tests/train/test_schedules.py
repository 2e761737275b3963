"""Learning rate schedules equal the reference's."""

import pytest
from golden_case import load_case

from rae_xla.config import load_config
from rae_xla.train.schedules import make_schedule

CASE = load_case("train/lr_schedules")


@pytest.mark.parametrize("row", CASE.meta["rows"], ids=lambda row: str(row["i"]))
def test_recorded_schedules(row, tmp_path):
    file = tmp_path / "run.yaml"
    import yaml

    file.write_text(yaml.safe_dump({"training": row["training_cfg"]}))
    training = load_config(str(file)).training
    schedule = make_schedule(training.optimizer, training.scheduler, row["steps_per_epoch"])
    recorded = CASE[f"out.lr.{row['i']}"].tolist()
    assert [schedule(k) for k in range(len(recorded))] == pytest.approx(recorded, rel=1e-6)
    assert [schedule(k) for k in range(5)] == pytest.approx(row["lr_float64_first5"], rel=1e-12)
