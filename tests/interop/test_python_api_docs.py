"""Run the examples of docs/python_api.md on tiny models."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import rae_xla
from rae_xla.sample.tiny_model import write_tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "python_api.md"


def _set_shift_base(folder: Path, base: float) -> None:
    """Record the time shift that a small latent needs."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"time_dist_shift_base": base}))


@pytest.fixture
def tiny_published_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with tiny models: existing paths take precedence over published names."""
    (tmp_path / "tiny").mkdir()
    config_file = write_tiny_model(tmp_path / "tiny")
    config = rae_xla.load_config(config_file)
    rae = rae_xla.instantiate(config.stage_1)
    model = rae_xla.instantiate(config.stage_2)
    rae.save_pretrained(tmp_path / "rae-dinov2-b-256")
    model.save_pretrained(tmp_path / "ditdh-xl-256", rae=rae)
    _set_shift_base(tmp_path / "ditdh-xl-256", config.misc.time_dist_shift_base)
    rae.save_pretrained(tmp_path / "ditdh-xl-256" / "rae")
    published = tmp_path / "configs" / "sampling" / "ditdh_xl_256.yaml"
    published.parent.mkdir(parents=True)
    shutil.copy(config_file, published)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rae_xla.runtime.choose_backend", lambda: "torch")
    return tmp_path


def test_the_examples_run(tiny_published_models: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) >= 6
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
    assert Path("retriever.png").is_file()
    assert namespace["samples"].shape == namespace["reconstructions"].shape
    assert namespace["config"].sampler.mode == "SDE"
    assert type(namespace["tiny"]) is rae_xla.DiTDH


def test_the_page_lists_every_public_name() -> None:
    page = PAGE.read_text()
    for name in rae_xla.__all__:
        if name != "__version__":
            assert f"`rae_xla.{name}`" in page
            assert getattr(rae_xla, name).__doc__
    assert set(rae_xla.__all__) <= set(dir(rae_xla))
