"""Loading, validation and identity of configurations."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from golden_case import GOLDEN, load_case

import rae_xla
from rae_xla.config import load_config, split_batch
from rae_xla.config.key_tables import update
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import find_class
from rae_xla.train.schedules import make_schedule

ROOT = Path(__file__).parents[2]
PUBLISHED = Path(__file__).parents[1] / "published"
OURS = sorted(
    p
    for p in (ROOT / "configs").rglob("*.yaml")
    if not {"quickstart", "sharding"} & {*p.relative_to(ROOT).parts}
)
GOOD = [p for p in sorted(PUBLISHED.glob("*.yaml")) if "inconsistent" not in p.name]
STAGE_2 = PUBLISHED / "stage2_256.yaml"
STAGE_1 = PUBLISHED / "stage1_training.yaml"


def load_error(path, *overrides):
    """Return the message of the ``UserError`` that loading raises; it must be one line."""
    with pytest.raises(UserError) as error:
        load_config(path, list(overrides))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# Files


@pytest.mark.parametrize("path", [*OURS, *GOOD], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_loads_and_loads_back_equal(path, tmp_path):
    config = load_config(path)
    config.save(tmp_path / "run" / "config.yaml")
    again = load_config(tmp_path / "run" / "config.yaml")
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    assert yaml.safe_load(config.to_yaml()) == config.to_dict()


def test_published_stage_2():
    config = load_config(STAGE_2)
    assert config.stage_2.params["hidden_size"] == [1152, 2048]
    assert config.misc.latent_size == (768, 16, 16)
    assert config.time_dist_shift == pytest.approx(48**0.5)
    assert config.misc.null_label == 1000
    assert config.training.log_every == 100
    assert config.training.clip_grad == 1.0
    assert config.data.num_workers == 16
    assert config.data.image_size == 256
    assert config.eval.reference_npz_path == "data/imagenet/VIRTUAL_imagenet256_labeled.npz"


def test_published_legacy_keys_are_translated():
    config = load_config(PUBLISHED / "stage2_256_legacy.yaml")
    assert dataclasses.asdict(config.training.scheduler) == {
        "type": "linear",
        "warmup_epochs": 40,
        "warmup_steps": None,
        "decay_end_epoch": 800,
        "decay_end_steps": None,
        "base_lr": 2e-4,
        "final_lr": 2e-5,
        "warmup_from_zero": False,
    }
    assert config.checkpoint.every_steps == 5000
    assert config.guidance.scale == 1.0


def test_published_autoguidance():
    guidance = load_config(PUBLISHED / "sampling_512_autoguidance.yaml").guidance
    assert (guidance.scale, guidance.t_min, guidance.t_max) == (1.5, 0.0, 1.0)
    assert guidance.guidance_model.ckpt.endswith("DiTDH-S_ep20/stage2_model.pt")
    rates = load_config(PUBLISHED / "sampling_512_autoguidance.yaml").sampler.params
    assert (rates.atol, rates.rtol) == (1e-6, 1e-3)


def test_published_stage_1():
    config = load_config(STAGE_1)
    assert config.stage_2 is None
    assert config.gan.loss.disc_upd_start == 6
    assert config.gan.disc.scheduler.type == "cosine"
    assert config.eval.metrics == ("psnr", "ssim", "rfid")
    assert config.data.image_size == 256


def test_published_stray_quote_is_removed():
    params = load_config(PUBLISHED / "stage1_pretrained_512.yaml").stage_1.params
    assert params["encoder_config_path"] == "facebook/dinov2-with-registers-base"


def test_published_512_training_file_is_rejected_with_a_correction():
    path = PUBLISHED / "stage2_512_inconsistent.yaml"
    message = load_error(path)
    assert str(path) in message
    assert "encoder_input_size 448" in message
    assert "misc.latent_size: [768, 32, 32]" in message
    fixed = re.search("Write (.*)", message)[1].replace(": ", "=")
    config = load_config(path, re.split(r", (?=\w+\.)", fixed))
    assert config.time_dist_shift == pytest.approx(192**0.5)


def test_our_configs_equal_the_published_recipe():
    ours, theirs = load_config(ROOT / "configs/stage2/ditdh_xl_256.yaml"), load_config(STAGE_2)
    assert ours.diff(theirs) == []
    ours, theirs = load_config(ROOT / "configs/stage1/dinov2_b_256.yaml"), load_config(STAGE_1)
    assert ours.diff(theirs) == ["training.clip_grad"]  # null in ours, 0 in theirs: both mean none


@pytest.mark.parametrize(
    ("name", "millions"),
    [("ditdh_s_256", 196), ("ditdh_b_256", 294), ("ditdh_l_256", 621), ("ditdh_xl_256", 839)],
)
def test_our_configs_have_the_published_sizes(name, millions):
    spec = load_config(ROOT / f"configs/stage2/{name}.yaml").stage_2
    with torch.device("meta"):
        model = rae_xla.instantiate(spec)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)


@pytest.mark.parametrize("size", ["B", "L", "XL"])
def test_decoder_configs_give_the_published_decoders(size):
    known = load_case(f"keymaps/decoder_ViT{size}").meta["config"]["decoder_config"]
    ours = json.loads((ROOT / f"configs/decoder/ViT{size}/config.json").read_text())
    own = {"image_size", "patch_size"}  # the published files derive these from the encoder
    assert {k: known[k] for k in ours if k not in own} == {
        k: v for k, v in ours.items() if k not in own
    }
    with torch.device("meta"):
        decoder = find_class("ViTDecoder")(ours | {"patch_size": 16}, num_patches=256)
    assert (
        len(decoder.state_dict()) == load_case(f"keymaps/decoder_ViT{size}").meta["n_state_tensors"]
    )


# Learning-rate schedules of the reference


@pytest.mark.parametrize("row", load_case("train/lr_schedules").meta["rows"], ids=lambda r: r["i"])
def test_every_reference_schedule_can_be_configured(row, write):
    path = write(yaml.safe_dump({"training": row["training_cfg"]}))
    training = load_config(path).training
    schedule = make_schedule(training.optimizer, training.scheduler, row["steps_per_epoch"])
    rates = torch.tensor([schedule(k) for k in range(200)])
    torch.testing.assert_close(rates, load_case("train/lr_schedules")[f"out.lr.{row['i']}"])
    assert list(training.optimizer.betas) == row["betas"]


def test_legacy_spellings_of_the_optimizer(write):
    path = write("training: {beta: 0.9, wd: 0.1, optimizer: {type: AdamW}}")
    optimizer = load_config(path).training.optimizer
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.9), 0.1)
    path = write("training: {base_lr: 1.0e-3, optimizer: {lr: 5.0e-4}}")
    assert load_config(path).training.optimizer.lr == 5e-4  # the current name wins
    assert "expected one of adamw, muon, got 'sgd'" in load_error(
        write("training: {optimizer: {type: sgd}}")
    )


def test_contradictory_legacy_spellings_are_rejected(write):
    path = write("training: {warmup_epochs: 5, decay_start_epoch: 40}")
    message = load_error(path)
    assert f"training.warmup_epochs: 5 and training.decay_start_epoch: 40 (in {path})" in message
    assert "training.scheduler.warmup_epochs" in message


# Precedence and interpolation


def test_overrides_win_over_the_file_and_the_file_over_defaults(write):
    path = write("training: {epochs: 3, ema_decay: 0.9}\nruntime:\n")
    config = load_config(path, ["training.epochs=4", "training.optimizer.betas=[0.5,0.6]"])
    assert (config.training.epochs, config.training.ema_decay) == (4, 0.9)
    assert config.training.optimizer.betas == (0.5, 0.6)
    assert config.training.grad_accum_steps == 1
    assert load_config(path, ["training.ema_decay=0"]).training.ema_decay == 0
    assert load_config(None, ["training.clip_grad=null"]).training.clip_grad is None


def test_a_legacy_spelling_on_the_command_line_wins_over_the_file():
    config = load_config(STAGE_2, ["training.base_lr=1e-3", "guidance.t-min=0.2"])
    assert config.training.scheduler.base_lr == 1e-3
    assert config.guidance.t_min == 0.2


def test_interpolation(write, monkeypatch):
    monkeypatch.setenv("SHARDS", "gs://bucket/shards")
    path = write(
        "data: {train: '${oc.env:SHARDS}/train'}\n"
        "training: {base_lr: 1.0e-3, final_lr: '${training.base_lr}', steps: '${training.epochs}'}"
    )
    config = load_config(path, ["training.epochs=7"])
    assert config.data.train == "gs://bucket/shards/train"
    assert config.training.scheduler.final_lr == 1e-3
    assert config.training.steps == 7
    assert load_config(write("training: {steps: '${training.epochs}'}")).training.steps == 1400
    assert "nothing" in load_error(write("training: {steps: '${training.nothing}'}"))


def test_omitted_values_are_derived_from_the_models(write):
    text = STAGE_2.read_text().replace("misc:", "misc: {}\neval_notes:")
    tree = yaml.safe_load(text)
    del tree["eval_notes"]
    config = load_config(write(yaml.safe_dump(tree)))
    assert config.misc == load_config(STAGE_2).misc
    config = load_config(write(yaml.safe_dump(tree)), ["stage_2.params.num_classes=10"])
    assert (config.misc.num_classes, config.misc.null_label) == (10, 10)


@pytest.mark.parametrize(("encoder", "px", "side"), [("dinov2", 56, 4), ("siglip2", 32, 4)])
def test_geometry_is_read_from_a_local_encoder(write, encoder, px, side):
    folder = GOLDEN / "rae" / encoder / "encoder"
    params = {"encoder_config_path": str(folder), "encoder_input_size": px, "decoder_patch_size": 8}
    path = write(yaml.safe_dump({"stage_1": {"target": "RAE", "params": params}}))
    config = load_config(path)
    assert config.misc.latent_size == (32, side, side)
    assert config.data.image_size == 8 * side


def test_the_latent_size_of_an_unknown_encoder_is_not_derived(write):
    params = {"encoder_config_path": "someone/else", "encoder_input_size": 100}
    path = write(yaml.safe_dump({"stage_1": {"target": "RAE", "params": params}}))
    assert load_config(path).misc.latent_size is None


# Rejected files


def test_a_missing_file_is_reported_with_similar_names(tmp_path):
    message = load_error(ROOT / "configs/stage2/ditdh_xs_256.yaml")
    assert "ditdh_s_256.yaml" in message
    assert "does not exist" in load_error(tmp_path / "nowhere" / "x.yaml")
    assert "is a folder" in load_error(tmp_path)


def test_invalid_yaml_is_reported_with_its_line(write):
    path = write("training:\n  epochs: 3\n  betas: [0.9, 0.95\ndata:\n")
    assert f"{path}, line 4" in load_error(path)
    assert "line 2" in load_error(write("data:\n\ttrain: x\n"))
    assert "has no sections" in load_error(write(""))
    assert "has no sections" in load_error(write("- a\n- b\n"))
    (path.parent / "w.yaml").write_bytes(b"\xff\xfe\x00")
    assert "w.yaml" in load_error(path.parent / "w.yaml")


# Rejected keys and types


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("training.epohs=3", "Did you mean training.epochs?"),
        ("trainin.epochs=3", "Did you mean training?"),
        ("gan.disc.arch.recip=S_8", "Did you mean gan.disc.arch.recipe?"),
        ("training.precision=bf16", "Did you mean runtime.precision?"),
        ("mesh.xyz=2", "Valid here: ici, dcn, sharding."),
        ("mesh.fsdp=2", "mesh.ici.fsdp"),
        ("stage_2.params.hiden_size=[8,8]", "Did you mean stage_2.params.hidden_size?"),
        ("stage_2.chpt=x", "Did you mean stage_2.ckpt?"),
    ],
)
def test_unknown_keys(override, hint):
    message = load_error(STAGE_2, override)
    assert re.match(r"unknown key (\S+) \(on the command line\)", message)[1] in override
    assert hint in message


def test_an_unknown_key_is_reported_with_its_file(write):
    path = write("stage_1:\n  target: stage1.RAE\n  params: {noise_taw: 0.8}\n")
    message = load_error(path)
    assert f"unknown key stage_1.params.noise_taw (in {path})" in message
    assert "Did you mean stage_1.params.noise_tau?" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.epochs=many", "expected an integer, got 'many' (str)"),
        ("training.epochs=1.5", "expected an integer, got 1.5 (float)"),
        ("training.epochs=true", "expected an integer, got True (bool)"),
        ("training.epochs=null", "expected an integer, got null"),
        ("training.clip_grad=x", "expected a number or null, got 'x' (str)"),
        ("training.optimizer.betas=[0.9]", "expected a list of 2 numbers, got [0.9] (list)"),
        ("eval.metrics=[1]", "expected a list of strings"),
        ("data.flip=1", "expected true or false or null, got 1 (int)"),
        ("data.train=5", "expected a string or a list of strings or null, got 5 (int)"),
        ("sampler.mode=PDE", "expected one of ODE, SDE, got 'PDE' (str)"),
        ("training=3", "expected a section of `key: value`, got 3 (int)"),
        ("stage_1.params.encoder_params=3", "expected a section of `key: value`, got 3 (int)"),
        ("stage_2.params.num_heads=[1,2,3]", "expected an integer or a list of 2 integers"),
    ],
)
def test_wrong_types(override, expected):
    message = load_error(STAGE_2, override)
    assert message.startswith(f"{override.split('=')[0]} (on the command line): ")
    assert expected in message


def test_a_wrong_type_is_reported_with_its_file(write):
    path = write("training: {epochs: soon}")
    assert load_error(path).startswith(f"training.epochs (in {path}): expected an integer")
    assert f"stage_1.target is missing (in {path})" in load_error(write("stage_1: {params: {}}"))


@pytest.mark.parametrize("override", ["training.epochs", "=3", "training.epochs 3"])
def test_malformed_override(override):
    assert "expected key=value" in load_error(None, override)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("stage_2.target=DiTHD", "did you mean DiTDH?"),
        ("stage_2.target=RAE", "expected DiTDH or LightningDiT, got RAE"),
        ("stage_1.target=DiTDH", "expected RAE, got DiTDH"),
    ],
)
def test_targets(override, reason):
    message = load_error(STAGE_2, override)
    assert override.split("=")[0] in message
    assert reason in message


@pytest.mark.parametrize(
    ("training", "every_steps", "epochs_between"),
    [
        ("epochs: 16, checkpoint_interval: 5000, sample_interval: 0", 5000, 4),
        ("epochs: 16, checkpoint_interval: 10, sample_interval: 0", 10, 4),
        ("epochs: 16, checkpoint_interval: 5000, sample_every: 0", 5000, 4),
        ("epochs: 16, checkpoint_interval: 20", None, 20),
        ("epochs: 1400, checkpoint_interval: 200", None, 200),
        ("checkpoint_interval: 5000", None, 5000),
    ],
)
def test_an_interval_that_counts_steps(training, every_steps, epochs_between, write, caplog):
    """The branches XLA and deprecated-gpu of the published code count steps."""
    config = load_config(write(f"training: {{{training}}}"))
    assert config.checkpoint.every_steps == every_steps
    assert config.training.checkpoint_interval == epochs_between
    assert ("is read as checkpoint.every_steps" in caplog.text) == (every_steps is not None)
    if "sample_" in training:
        assert config.training.sample_every == 0


def test_a_shorter_run_on_the_command_line_does_not_change_the_unit():
    config = load_config(STAGE_2, ["training.epochs=1"])
    assert config.checkpoint.every_steps is None


# Contradictory settings


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["stage_1.params.encoder_input_size=225"], "write 224 or 238"),
        (["stage_2.params.input_size=32"], "Write stage_2.params.input_size: 16"),
        (["stage_2.params.in_channels=384"], "Write stage_2.params.in_channels: 768"),
        (["misc.latent_size=[768,32,32]"], "Write misc.latent_size: [768, 16, 16]"),
        (["misc.time_dist_shift_dim=16384"], "for 2 write misc.time_dist_shift_base: 49152"),
        (["misc.time_dist_shift_base=1e6"], "must be at least 1"),
        (["transport.params.time_dist_shift=3"], "set the base instead"),
        (["stage_1.params.reshape_to_2d=false"], "stage 2 needs latents as C x H x W"),
        (["misc.num_classes=1001"], "stage_2.params.num_classes is 1000"),
        (["misc.num_classes=10"], "misc.null_label: 1000"),
        (["misc.null_label=999"], "write 1000"),
        (["stage_2.params.num_classes=10"], "stage_2.params.num_classes is 10"),
        (["guidance.t_min=0.5", "guidance.t_max=0.5"], "t_min < t_max"),
        (["guidance.t_max=1.5"], "expected a number of at least 0 and at most 1, got 1.5"),
        (["guidance.method=autoguidance"], "needs a weaker model"),
        (["guidance.scale=2", "stage_2.params.class_dropout_prob=0"], "class_dropout_prob 0"),
        (["training.epochs=0"], "expected a number of at least 1, got 0"),
        (["training.steps=-1"], "expected a number of at least 1, got -1"),
        (["training.ema_decay=1"], "expected a number of at least 0 and below 1, got 1.0"),
        (["training.grad_accum_steps=3"], "3 does not divide training.global_batch_size 1024"),
        (["mesh.ici.data=-1"], "only one of mesh.ici.data and mesh.ici.fsdp"),
        (["mesh.ici.data=0"], "expected a number of at least 1, or -1, got 0"),
        (["mesh.dcn.data=-1"], "expected a number of at least 1, got -1"),
        (["stage_2.params.num_heads=[7,16]"], "a multiple of stage_2.params.num_heads 7, got 1152"),
        (["stage_2.params.patch_size=3"], "a multiple of stage_2.params.patch_size 3, got 16"),
        (["mesh.ici.tensor=3"], "3 does not divide stage_2.params.hidden_size [1152, 2048]"),
        (["runtime.precision=fp16"], "write bf16, or fp32"),
        (["sampler.params.reverse=true"], "only false is supported"),
        (["training.optimizer.lr=1e-3"], "Set training.scheduler.base_lr instead"),
    ],
)
def test_contradictions(overrides, reason):
    message = load_error(STAGE_2, *overrides)
    assert reason in message
    assert re.match(r"[a-z_0-9]+\.[a-z_.0-9]+( \(|=)", message), "the message starts with its key"


def test_a_guidance_model_for_other_labels_is_rejected():
    path = PUBLISHED / "sampling_512_autoguidance.yaml"
    key = "guidance.guidance_model.params.num_classes"
    message = load_error(path, f"{key}=100")
    assert message.startswith(key)
    assert "stage_2.params.num_classes is 1000" in message


def test_a_stage_1_image_size_other_than_the_decoders_is_rejected():
    assert "write 256" in load_error(STAGE_1, "data.image_size=224")


def test_fewer_classes_may_be_sampled_if_the_null_label_is_given():
    config = load_config(STAGE_2, ["misc.num_classes=10", "misc.null_label=1000"])
    assert (config.misc.num_classes, config.misc.null_label) == (10, 1000)


def test_the_base_selects_the_time_shift():
    assert load_config(STAGE_2, ["misc.time_dist_shift_base=196608"]).time_dist_shift == 1
    assert load_config(ROOT / "configs/ablations/dit_xl_256_no_shift.yaml").time_dist_shift == 1


def test_an_invalid_encoder_config_is_reported_with_its_path(write, tmp_path):
    (tmp_path / "config.json").write_text('{"patch_size": 14}')
    params = {"encoder_config_path": str(tmp_path)}
    path = write(yaml.safe_dump({"stage_1": {"target": "RAE", "params": params}}))
    assert str(tmp_path / "config.json") in load_error(path)


# Batch and devices


def batch_sizes(devices, *overrides):
    split = split_batch(load_config(None, list(overrides)), devices)
    return split.global_batch_size, split.micro_batch_size, split.per_device


def test_the_batch_is_split_over_the_devices():
    assert batch_sizes(4, "training.global_batch_size=64") == (64, 64, 16)
    assert batch_sizes(4, "training.global_batch_size=64", "training.grad_accum_steps=2") == (
        64,
        32,
        8,
    )
    assert batch_sizes(4, "training.batch_size=8", "training.grad_accum_steps=2") == (64, 32, 8)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], "training.global_batch_size is missing"),
        (["training.global_batch_size=66"], "write a multiple of 4, such as 64"),
        (["training.global_batch_size=2"], "such as 4"),
        (["training.global_batch_size=64", "training.batch_size=8"], "give only one of the two"),
    ],
)
def test_a_batch_that_cannot_be_split_is_rejected(overrides, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        split_batch(load_config(None, overrides), 4)


# Identity of a run


@pytest.mark.parametrize(
    "override",
    [
        "tracking.wandb=true",
        "checkpoint.every_steps=7",
        "training.checkpoint_interval=9",
        "training.epochs=1",
        "training.grad_accum_steps=2",
        "mesh.ici.data=2",
        "runtime.backend=torch",
        "data.num_workers=2",
        "data.train=moved",
        "sampler.params.num_steps=10",
        "stage_2.target=DiTDH",
        "stage_2.params.mlp_ratio=4",
    ],
)
def test_keys_that_do_not_change_the_identity(override):
    mine, other = load_config(STAGE_2), load_config(STAGE_2, [override])
    assert mine.fingerprint() == other.fingerprint()
    assert mine.diff(other) == []


@pytest.mark.parametrize(
    ("override", "differs"),
    [
        ("training.scheduler.base_lr=1e-3", ["training.scheduler.base_lr"]),
        ("stage_2.params.depth=[2,2]", ["stage_2.params.depth"]),
        ("stage_2.ckpt=w.pt", ["stage_2.ckpt"]),
        ("runtime.precision=bf16", ["runtime.precision"]),
        ("misc.time_dist_shift_base=1024", ["misc.time_dist_shift_base"]),
        ("training.global_batch_size=512", ["training.global_batch_size"]),
        ("gan={}", None),
    ],
)
def test_keys_that_change_the_identity(override, differs):
    mine, other = load_config(STAGE_2), load_config(STAGE_2, [override])
    assert mine.fingerprint() != other.fingerprint()
    found = mine.diff(other)
    assert found == other.diff(mine)
    assert found == (differs or [k for k in found if k.startswith("gan")])


def test_accumulation_is_part_of_the_identity_if_it_determines_the_batch():
    mine = load_config(None, ["training.batch_size=8"])
    other = load_config(None, ["training.batch_size=8", "training.grad_accum_steps=2"])
    assert mine.diff(other) == ["training.grad_accum_steps"]


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().training.epochs = 3


def test_reading_a_configuration_imports_no_torch():
    code = "import sys, rae_xla; rae_xla.load_config(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Documentation


def test_documentation_is_up_to_date():
    page = (ROOT / "docs/configuration.md").read_text()
    assert update(page) == page, "run: python -m rae_xla.config.key_tables docs/configuration.md"
    assert update(page.replace("| `fsdp` |", "| `fdsp` |")) == page


# Base files


def test_a_file_overrides_its_base(write):
    write("training: {epochs: 7, lr: 1.0e-3}\nmisc: {num_classes: 10}\n", "root.yaml")
    write("base: root.yaml\ntraining: {optimizer: {lr: 2.0e-3}}\n", "middle.yaml")
    top = write("base: middle.yaml\ntraining: {global_seed: 3}\n")
    config = load_config(top, ["training.epochs=9"])
    assert (config.training.epochs, config.training.optimizer.lr) == (9, 2e-3)
    assert (config.training.global_seed, config.misc.num_classes) == (3, 10)


def test_the_command_line_may_replace_the_base(write):
    write("training: {epochs: 1}\n", "one.yaml")
    other = write("training: {epochs: 2}\n", "other.yaml")
    top = write("base: one.yaml\ntraining: {global_seed: 3}\n")
    assert load_config(top).training.epochs == 1
    changed = load_config(top, [f"base={other}"]).training
    assert (changed.epochs, changed.global_seed) == (2, 3)


def test_an_invalid_base_is_rejected(write):
    write("base: run.yaml\n", "b.yaml")
    assert "cycle" in load_error(write("base: b.yaml\n"))
    assert "no config file" in load_error(write("base: none.yaml\n"))
    assert "expected the path" in load_error(write("base: [x.yaml]\n"))


def test_every_ablation_changes_one_key():
    folder = ROOT / "configs" / "ablations" / "decoder"
    base = load_config(folder / "base.yaml")
    found = {p.stem: load_config(p).diff(base) for p in folder.glob("*.yaml")}
    assert found.pop("base") == []
    assert found.pop("digits") != []
    assert found == {
        "gan_off": ["gan.loss.disc_weight"],
        "tau_0": ["stage_1.params.noise_tau"],
        "lr_1e-4": ["training.scheduler.base_lr"],
        "lr_4e-4": ["training.scheduler.base_lr"],
        "lpips_0.5": ["gan.loss.perceptual_weight"],
        "lpips_2": ["gan.loss.perceptual_weight"],
    }
