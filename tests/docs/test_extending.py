"""The examples in docs/extending.md run, one after another, on a tiny data set and tiny models."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from random_networks import write_inception
from tiny import CLASSES, make_configs, make_shards
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from rae_xla.config import model_params, registry
from rae_xla.models.encoders import ENCODERS
from rae_xla.train.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def restored_registries():
    """Undo what the page registers."""
    tables = (TASKS, ENCODERS, registry.TARGETS, registry._FULL_NAMES, model_params.DENOISERS)
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def write_clip(folder):
    """A CLIP vision tower with random weights, as transformers saves one."""
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8, projection_dim=16,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return str(folder)


def write_model_config(stage2, path):
    content = yaml.safe_load(stage2.read_text())
    params = {"input_size": 4, "in_channels": 32, "num_classes": CLASSES}
    content["stage_2"] = {"target": "ConvDenoiser", "params": params}
    path.write_text(yaml.safe_dump(content))
    return path


def test_every_example_runs(tmp_path, restored_registries, monkeypatch):
    configs = make_configs(tmp_path, make_shards(tmp_path))
    inception = write_inception(tmp_path / "inception.pth")
    results = tmp_path / "results"
    results.mkdir()
    page = ModuleType("extending_page")
    page.__dict__.update(
        CONFIG=str(configs["stage2"]),
        RESULTS=str(results),
        MODEL_CONFIG=str(write_model_config(configs["stage2"], tmp_path / "conv.yaml")),
        CLIP_FOLDER=write_clip(tmp_path / "clip"),
        IMAGE_SIZE=32,
        PATCH_SIZE=8,
        DECODER_CONFIG=str(Path(__file__).parents[1] / "golden/rae/dinov2/decoder_config"),
        EVAL=[
            "eval.eval_interval=2",
            "eval.metrics=[is]",
            "eval.num_samples=8",
            "eval.batch_size=8",
            f"weights.inception={inception}",
        ],
    )
    monkeypatch.setitem(sys.modules, page.__name__, page)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), page.__dict__)
    assert sorted(p.name for p in results.iterdir()) == [
        "clip_rae", "conv", "diversity", "early", "probe",
    ]  # fmt: skip
