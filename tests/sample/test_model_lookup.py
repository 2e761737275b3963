"""Class names of a model: a run's own come first."""

import json
from pathlib import Path

import pytest

from rae_xla.data.class_names import imagenet_names
from rae_xla.errors import UserError
from rae_xla.interop.layouts import write_layout
from rae_xla.interop.model_source import open_model_source
from rae_xla.sample.model_lookup import resolve_class_names, resolve_model
from rae_xla.sample.tiny_model import write_tiny_model

OWN = [f"species {label}" for label in range(1000)]


@pytest.fixture
def run(tmp_path):
    """Write a folder that has the files of a run of 1,000 classes."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_tiny_model(folder)
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    (folder / "stage2_model.pt").rename(checkpoints / "step-00000010.pt")
    text = (folder / "config.yaml").read_text()
    name = str(checkpoints / "step-00000010.pt")
    (folder / "config.yaml").write_text(text.replace(str(folder / "stage2_model.pt"), name))
    return folder


def record(run, names):
    (run / "classes.json").write_text(json.dumps(names))


def test_names_of_a_run_come_first(run):
    record(run, OWN)
    for model in (run, run / "config.yaml"):
        assert resolve_class_names(resolve_model(model)) == tuple(OWN)
    assert resolve_class_names(resolve_model(run), ["x"] * 1000)[0] == "x"
    with pytest.raises(UserError, match="2 class names were given, the model has 1000"):
        resolve_class_names(resolve_model(run), ["cat", "dog"])


def test_a_model_may_have_more_classes_than_its_data(run):
    record(run, ["cat", "dog"])
    names = resolve_class_names(resolve_model(run))
    assert names[:3] == ("cat", "dog", "2")
    assert len(names) == 1000


def test_imagenet_names_are_a_guess_for_a_run(run, caplog):
    assert resolve_class_names(resolve_model("ditdh-xl-256")) == imagenet_names()
    assert not caplog.records
    assert resolve_class_names(resolve_model(run)) == imagenet_names()
    assert "no class names are recorded for this model" in caplog.text


def test_imagenet_names_are_a_guess_for_weights_of_an_unknown_run(run, tmp_path, caplog):
    record(run, OWN)
    exported = tmp_path / "exported.pt"
    exported.write_bytes((run / "checkpoints/step-00000010.pt").read_bytes())
    model = resolve_model(run / "config.yaml", [f"stage_2.ckpt={exported}"])
    assert resolve_class_names(model) == imagenet_names()
    assert "no class names are recorded for this model" in caplog.text
    caplog.clear()
    published = "models/DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt"
    resolve_class_names(resolve_model(run / "config.yaml", [f"stage_2.ckpt={published}"]))
    assert not caplog.records


def test_converted_models_keep_the_names(run, tmp_path):
    record(run, OWN)
    checkpoint = run / "checkpoints" / "step-00000010.pt"
    write_layout(open_model_source(checkpoint), "pretrained", Path(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"saved/config\.json"):  # of a latent this small
        resolve_model(tmp_path / "saved", rae=run)
    saved = resolve_model(tmp_path / "saved", ["misc.time_dist_shift_base=512"], rae=run)
    assert resolve_class_names(saved) == tuple(OWN)
    write_layout(open_model_source(tmp_path / "saved"), "pretrained", Path(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "classes.json").read_text()) == OWN
