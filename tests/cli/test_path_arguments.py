"""Paths on the command line: read once, and outputs that cannot be written refused at once."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from schema_keys import ALL_KEYS, rules
from tiny_captions import make_captioned_shards, make_config
from tiny_text_to_image import write_tiny_text_to_image

from rae_xla import storage
from rae_xla.cli.main import VERBS, main, verb_module
from rae_xla.cli.options import NumberAction, PathAction, check_not_an_input
from rae_xla.config.paths import PathRule
from rae_xla.errors import UserError
from rae_xla.sample.tiny_model import write_tiny_model

TEXTS = {
    "key=value", "TEXT", "NAME", "NAME,NAME", "NAME[,NAME...]", "NAME|OWNER/REPO", "OWNER/REPO",
    "FIELD", "SLICE[,SLICE...]", "NxCARD[,NxCARD...]", "ADDRESS", "HOW", "WHICH", "PATTERN", "R",
    "SIZE", "N,N", "N[,N...]", None,
}  # fmt: skip
"""Placeholders of arguments that are neither paths nor numbers; None: of choices and of names."""

CHECKED_LATER = {("evaluate", "samples"), ("evaluate", "decoders")}
"""Options with several values, among which argparse may also put settings."""

ZERO = {
    "latent-index", "temperature", "seed", "min-side", "min-chars", "min-score", "step", "price",
    "cfg-interval", "port", "sample",
}  # fmt: skip
MINUS_ONE = {"min-score"}
HUGE = {"min-score"}
"""Options that may be 0, -1 or 1e30."""


def arguments(verb: str) -> Iterator[argparse.Action]:
    """Yield every argument of a verb and of its subcommands."""
    parser = argparse.ArgumentParser()
    verb_module(verb).add_arguments(parser)
    parsers = [parser]
    while parsers:
        for action in parsers.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            else:
                yield action


ARGUMENTS = [(verb, action) for verb in VERBS for action in arguments(verb)]


def of_type(kind: type[argparse.Action]) -> list[Any]:
    return [
        pytest.param(verb, action, id=f"{verb} {(action.option_strings or [action.metavar])[-1]}")
        for verb, action in ARGUMENTS
        if isinstance(action, kind)
    ]


def test_every_argument_has_one_type():
    """A path is parsed by ``PathAction``, and a number checked by ``NumberAction``."""
    for verb, action in ARGUMENTS:
        if isinstance(action, PathAction | NumberAction) or action.nargs == 0:
            continue
        known = action.choices is not None or action.metavar in TEXTS
        assert known or (verb, action.dest) in CHECKED_LATER, action
        assert action.type not in (int, float) or action.choices is not None, action


@pytest.mark.parametrize(("verb", "action"), of_type(NumberAction))
def test_every_number_has_a_range(verb, action):
    name = action.option_strings[0].removeprefix("--")
    allowed = {0: ZERO, -1: MINUS_ONE, 1e30: HUGE}
    values = [0, -1, 10**400] if action.type is int else [0.0, -1.0, 1e30]
    for value in [*values, 10**30, float("nan"), float("inf"), -float("inf")]:
        given = [0.0, value] if action.nargs == 2 else value
        parser, parsed = argparse.ArgumentParser(), argparse.Namespace()
        if name in allowed.get(value, ()):
            action(parser, parsed, given, f"--{name}")
            assert getattr(parsed, action.dest) == given
            continue
        with pytest.raises(UserError, match=rf"^--{name} .*: expected a (finite )?number"):
            action(parser, parsed, given, f"--{name}")


@pytest.mark.parametrize(("verb", "action"), of_type(PathAction))
def test_every_path_is_parsed(verb, action, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser, parsed = argparse.ArgumentParser(), argparse.Namespace()

    def parse(text: str) -> str:
        many = action.nargs == "+"
        action(parser, parsed, [text] if many else text, "--option")
        value = getattr(parsed, action.dest)
        return value[0] if many else value

    assert parse("~/x") == f"{tmp_path}/x"
    assert parse("a/b/") == "a/b"
    for text in ("None", "", "s3://bucket/x", "gs:/bucket", "gs://"):
        with pytest.raises(ValueError, match=r"^--option"):
            parse(text)
    if action._rule.remote:
        assert parse("gs://bucket//x/") == "gs://bucket/x"
    else:
        with pytest.raises(ValueError, match="gs:// is not supported here"):
            parse("gs://bucket/x")


@pytest.mark.parametrize(
    "command",
    [
        "shards make s3://b/x.tar o",
        "train stage2 --config c.yaml --results-dir s3://b/run",
        "evaluate gen --samples s3://b/set --metrics is",
        "evaluate decoders --config c.yaml --latents l.npy --decoders s3://b/d.pt",
        "checkpoints list hdfs://x",
        "generate --out abfs://x",
        "plan --config c.yaml data.train=s3://b/x",
    ],
)
def test_other_schemes_end_in_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("training: {epochs: 1}")
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"rae-xla: error: .*://\S* is not supported.*local.*\n", error)
    assert os.listdir() == ["c.yaml"]


@pytest.mark.parametrize(
    "command",
    [
        "convert m.pt --to published --out ./m.pt",
        "convert m.pt --to safetensors --out link.pt",
        "convert d.yaml --to published --out m.pt",
        "checkpoints export m.pt --what decoder --out m.pt",
        "export decoder --ckpt m.pt --out m.pt",
        "evaluate gen --samples s.npz --metrics is --out s.npz",
        "plan --config c.yaml --analytic --topology v6e-8 --json ../here/c.yaml",
        "plan --config c.yaml --analytic --topology v6e-8 --data run --json run/index.json",
        "plan --config c.yaml --topology v6e-8 --json m.pt weights.vgg16=m.pt",
        "stats --config c.yaml --data run --out m.pt stage_1.target=RAE stage_1.ckpt=m.pt",
        "evaluate recon --config c.yaml --ckpt run --out run/checkpoints/1/x.pt",
        "evaluate gen --samples run --metrics is --out run/settings.json",
        "evaluate decoders --config c.yaml --metrics psnr --latents run/l.npy --decoders m.pt "
        "--out run",
        "report run --out run/metrics.jsonl",
        "checkpoints export run --out run/checkpoints/1/x.pt",
        "train stage2 --config c.yaml --data run --results-dir run",
    ],
)
def test_an_input_is_not_replaced(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "here/run/checkpoints/1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    contents = {"m.pt": "weights", "s.npz": "images", "c.yaml": "training: {epochs: 1}"}
    names = ("index.json", "settings.json", "metrics.jsonl", "l.npy", "checkpoints/1/x.pt")
    contents["d.yaml"] = "stage_1: {target: RAE, params: {pretrained_decoder_path: m.pt}}"
    contents |= {f"run/{name}": "{}" for name in names}
    for name, content in contents.items():
        Path(name).write_text(content)
    Path("link.pt").symlink_to("m.pt")
    if command.startswith("train"):
        monkeypatch.setattr("rae_xla.data.mixture.open_training_data", lambda *_: None)
    assert main(command.split()) == 2
    assert "which it would replace" in capsys.readouterr().err
    assert {name: Path(name).read_text() for name in contents} == contents


def test_an_output_in_an_input_folder_is_written_again(tmp_path):
    (tmp_path / "report.json").touch()
    check_not_an_input(tmp_path / "report.json", [str(tmp_path)])
    check_not_an_input(tmp_path / "new.npz", [str(tmp_path)])


def test_a_path_with_an_equals_sign_is_no_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = "evaluate gen --samples out/cfg=4 --metrics is training.epochs=2"
    assert main(command.split()) == 2
    assert "out/cfg=4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plan --config c.yaml --price nan", "--price nan: expected a number of at least 0"),
        ("generate --out o --cfg-scale inf", "--cfg-scale inf: expected a number of at least 1"),
        ("generate --out o --seed -1", "--seed -1: expected a number of at least 0"),
        (
            "sample --config c.yaml --out o --seed 9223372036854775808",
            "at most 9223372036854775807",
        ),
        (f"shards verify s --workers 1{'0' * 400}", "0: expected a number of at least 1"),
    ],
)
def test_numbers_of_the_command_line(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Return a folder with a tiny model, shards, and an export of weights."""
    place = tmp_path_factory.mktemp("tiny")
    write_tiny_model(place)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)
    np.savez(place / "d.npz", images=pixels, labels=np.arange(8) % 2)
    assert main(["shards", "make", str(place / "d.npz"), str(place / "shards")]) == 0
    return place


@pytest.fixture(scope="module")
def prompted(tmp_path_factory) -> Path:
    """Return a folder with a text-to-image model, and a run that is trained for a step."""
    place = tmp_path_factory.mktemp("prompted")
    write_tiny_text_to_image(place)
    (place / "prompts.txt").write_text("a red square")
    config = make_config(place, make_captioned_shards(place))
    words = "training.steps=1 training.posthoc_ema.widths=[0.1] --results-dir"
    assert main(["train", "t2i", "--config", str(config), *words.split(), str(place / "run")]) == 0
    return place


OUTPUTS = {
    "train": "train stage2 --config {tiny}/config.yaml runtime.backend=torch stage_2.ckpt=null "
    "data.train={tiny}/shards training.global_batch_size=4 --results-dir",
    "stats": "stats --config {tiny}/config.yaml --data {tiny}/shards --out",
    "generate": "generate --smoke --out",
    "sample": "sample --config {tiny}/config.yaml --labels 0,1 --num-samples 2 --out",
    "convert": "convert {tiny}/stage2_model.pt --to safetensors --out",
    "plan": "plan --config {tiny}/config.yaml --analytic --topology v6e-8 --batch 8 --json",
    "shards": "shards make {tiny}/d.npz",
    "shards stats": "shards stats {tiny}/shards --out",
    "checkpoint.dir": "train stage2 --config {tiny}/config.yaml runtime.backend=torch "
    "stage_2.ckpt=null data.train={tiny}/shards training.global_batch_size=4 --results-dir {new} "
    "checkpoint.dir=",
    "data.cache_dir": "train stage2 --config {tiny}/config.yaml runtime.backend=torch "
    "stage_2.ckpt=null data.train={tiny}/shards training.global_batch_size=4 --results-dir {new} "
    "data.cache_dir=",
    "train t2i": "train t2i --config {prompted}/t2i.yaml --results-dir",
    "generate --prompt": "generate --model {prompted}/model --prompt x --num-steps 2 "
    "runtime.backend=torch --out",
    "sample --prompts": "sample --model {prompted}/model --prompts {prompted}/prompts.txt "
    "--num-steps 2 runtime.backend=torch --out",
    "checkpoints ema": "checkpoints ema {prompted}/run --width 0.1 --out",
    "checkpoints export": "checkpoints export {prompted}/run --out",
    "export text-to-image": "checkpoints export {prompted}/run --what text-to-image --out",
    "shards index --captions": "shards index {prompted}/tars --captions --out",
}


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("place", ["in a file", "not writable"])
def test_outputs_that_cannot_be_written(
    output, place, tiny, prompted, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    # Permissions do not bind root, but no process can create a folder in /proc.
    path = {"in a file": f"{tmp_path}/file/x.safetensors", "not writable": "/proc/x/y"}[place]
    words = OUTPUTS[output].format(tiny=tiny, prompted=prompted, new=tmp_path / "new").split(" ")
    words = [*words[:-1], words[-1] + path] if words[-1].endswith("=") else [*words, path]
    assert main(words) not in (0, 1)
    error = capsys.readouterr().err
    message = error.strip().splitlines()[-1]
    assert message.startswith("rae-xla: error: "), error
    assert str(Path(path).parent) in message
    assert "Traceback" not in error
    assert set(os.listdir()) <= {"file", "new"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["000001.png", "samples.npz"])
def test_images_of_others_are_not_taken_for_a_set(name, tiny, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    words = OUTPUTS["sample"].format(tiny=tiny).split()
    assert main([*words, str(tmp_path), "runtime.backend=torch"]) == 2
    assert "but no settings.json" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.slow
def test_text_to_image_models_are_exported_to_a_bucket(prompted, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["checkpoints", "export", str(prompted / "run"), "--what", "text-to-image", "--out"]
    assert main([*command, f"{run_folder}/model"]) == 0
    assert {"config.json", "model.safetensors"} <= set(storage.list_files(f"{run_folder}/model"))
    assert os.listdir() == []
    assert main([*command, f"{run_folder}/model"]) == 2


@pytest.mark.slow
def test_an_average_is_written_to_a_bucket(prompted, run_folder):
    out = f"{run_folder}/average.pt"
    command = ["checkpoints", "ema", str(prompted / "run"), "--width", "0.1", "--out", out]
    assert main(command) == 0
    assert "average.pt" in storage.list_files(run_folder)


CONFIG_PATHS = [
    key
    for key, hint in ALL_KEYS.items()
    if rules(hint, PathRule) and not key.startswith("rae_xla.")
]
UNUSED = {"guidance.guidance_model.ckpt", "repa.encoder_config_path", "runtime.compile_cache"}
"""Keys that a run on plain torch without autoguidance and REPA does not read."""


UNUSABLE = {
    "a file": "{here}/file",
    "in a file": "{here}/file/x",
    "not readable": "/proc/x/y",
    "no such bucket": "gs://no-such-bucket/x",
}


@pytest.fixture
def unusable(tmp_path, monkeypatch) -> dict[str, str]:
    """Return paths that cannot be used; their file is in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "1")
    Path("file").write_text("not what you think")
    return {place: path.format(here=tmp_path) for place, path in UNUSABLE.items()}


def check_nothing_written(*allowed: str) -> None:
    assert set(os.listdir()) <= {"file", *allowed}
    assert Path("file").read_text() == "not what you think"


@pytest.mark.nightly
@pytest.mark.parametrize("key", CONFIG_PATHS)
@pytest.mark.parametrize("place", UNUSABLE)
def test_paths_of_a_configuration_that_cannot_be_used(key, place, tiny, prompted, unusable, capsys):
    """No traceback, nothing accepted that is used, nothing written elsewhere."""
    path = unusable[place]
    if key.startswith("text_to_image."):
        words = [*OUTPUTS["train t2i"].format(prompted=prompted).split(), "run"]
        if key == "text_to_image.language_model":
            words.append("text_to_image.language_model_config=null")
        code = main([*words, f"{key}={path}"])
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert code in (2, 77), error
        check_nothing_written("run")
        return
    words = OUTPUTS["train"].format(tiny=tiny).split()
    model = "{target: DiTDH, ckpt: %s}" if key == "guidance.guidance_model.ckpt" else "%s"
    value = model % (f"[{path}]" if key == "mesh.sharding" else path)
    key = key.removesuffix(".ckpt") if key == "guidance.guidance_model.ckpt" else key
    extra = ["eval={lite_interval: 0, eval_interval: 1, num_samples: 2}", "training.steps=1"]
    if key == "stage_1.params.normalization_stat_path" or key.startswith("weights."):
        extra.append("training.sample_every=0")
    code = main([*words, "run", *extra, f"{key}={value}"])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert (code in (2, 77)) or key in UNUSED or key.startswith("weights."), error
    check_nothing_written("run")


INPUTS = {
    "ask --model": "ask --prompt x --model",
    "ask --rae": "ask --prompt x --model {model} --rae",
    "ask --image": "ask --prompt x --model {model} --image",
    "ask --latent": "ask --prompt x --model {model} --latent",
    "ask --tokenizer": "ask --prompt x --model {model} --tokenizer",
    "serve --model": "serve --port 0 --model",
    "serve --rae": "serve --port 0 --model {model} runtime.backend=torch --rae",
    "serve --tokenizer": "serve --port 0 --model {model} runtime.backend=torch --tokenizer",
    "sample --prompts": "sample --model {model} --out run runtime.backend=torch --prompts",
    "sample --model": "sample --prompts {prompts} --out run --model",
    "sample --rae": "sample --prompts {prompts} --model {model} --out run --rae",
    "sample --tokenizer": "sample --prompts {prompts} --model {model} --out run --tokenizer",
    "generate --prompts": "generate --model {model} --out run runtime.backend=torch --prompts",
    "generate --clip": "generate --model {model} --prompt x --best-of 2 --select clip --out run "
    "runtime.backend=torch --clip",
    "checkpoints ema": "checkpoints ema --width 0.1 --out run",
    "shards index --sidecar": "shards index {tars} --captions --out run --sidecar",
    "shards captions": "shards captions --out run",
}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("option", "place"),
    [
        (option, place)
        for option in INPUTS
        for place in UNUSABLE
        if not (option.endswith("--prompts") and place == "a file")  # any text is a file of prompts
    ],
)
def test_inputs_of_text_to_image_verbs_that_cannot_be_used(
    option, place, prompted, unusable, capsys
):
    """The last argument is the path, after the option; for `checkpoints ema` it is RUN."""
    places = {"model": prompted / "model", "prompts": prompted / "prompts.txt"}
    words = INPUTS[option].format(tars=prompted / "tars", **places).split()
    code = main([*words, unusable[place]])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert code in (2, 77), error
    check_nothing_written("run")
