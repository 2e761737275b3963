"""Every numeric key and every path with values that cannot be: refused at load, with a message."""

from __future__ import annotations

import random
import re
from typing import Any, get_args, get_origin

import pytest
import yaml
from schema_keys import ALL_KEYS, leaf_types, rules

from rae_xla.config import RunConfig, free_form, load_config
from rae_xla.config.model_params import DENOISERS, RAEParams
from rae_xla.config.paths import PathRule
from rae_xla.config.typed import Origin, build
from rae_xla.errors import UserError

NAN, INFINITY = float("nan"), float("inf")
VALUES = (NAN, INFINITY, -INFINITY, 0, -1, 1e30, 10**30, 10**400, "text")

# What may be 0, -1 or 1e30, written down by hand because the schema is under test: keys, or names
# that mean the same in every section.
ZERO = {
    "atol", "diffusion_norm", "last_step_size", "train_eps", "sample_eps", "t_eps", "end",
    "scale", "unconditional_scale", "t_min", "t_max", "null_label",
    "sample_every", "clip_grad", "max_rollbacks", "hang_timeout", "global_seed", "ema_decay",
    "lr", "betas", "weight_decay", "momentum", "base_lr", "final_lr",
    "warmup_epochs", "warmup_steps", "decay_end_epoch", "decay_end_steps",
    "lite_interval", "key_depths", "prob", "cutout",
    "disc_weight", "perceptual_weight", "disc_start", "disc_upd_start", "lpips_start",
    "base_model_coeff", "repa.coeff", "adamw_lr", "text_loss_weight", "image_loss_weight",
    "num_workers", "max_bad_samples", "remat", "retry_seconds",
    "noise_tau", "stage_1.params.eps", "class_dropout_prob",
    "image_mean",
    "condition_dim", "condition_dropout_prob", "captions.weights", "max_chars",
    "prompt.layers", "dropped_tokens",
}  # fmt: skip
MINUS_ONE = {
    "prompt.layers",
    "clip_grad",
    "image_mean",
    "mesh.ici.data",
    "mesh.ici.fsdp",
    "mesh.ici.tensor",
}
HUGE = {"clip_grad", "skip_grad_norm", "max_d_weight"}

NUMERIC = {key: hint for key, hint in ALL_KEYS.items() if leaf_types(hint) & {int, float}}
PATHS = {key: rules(hint, PathRule)[0] for key, hint in ALL_KEYS.items() if rules(hint, PathRule)}


def accepts(key: str, value: Any) -> bool:
    """Return whether a key may take one of ``VALUES``."""
    if isinstance(value, str) or value != value or abs(value) == INFINITY:
        return False
    allowed = ZERO if value == 0 else MINUS_ONE if value == -1 else HUGE if value < 1e300 else set()
    parts = key.split(".")
    return any(".".join(parts[i:]) in allowed for i in range(len(parts)))


def shapes(hint: Any) -> list[int]:
    """Return the lengths of the lists that a key takes; 0 stands for a single number."""
    hint = get_args(hint)[0]
    options = [o for o in (get_args(hint) or [hint]) if o is not type(None) and o is not ...]
    if get_origin(hint) is tuple:
        options = [hint]
    found = []
    for option in options:
        members = get_args(option)
        found.append(0 if not members else 1 if members[-1] is ... else len(members))
    return found


def shaped(value: Any, length: int, key: str) -> Any:
    """Return a value, or a list that has it as its last element."""
    if not length:
        return value
    return [0.9 if "betas" in key else 8] * (length - 1) + [value]


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def build_section(key: str, value: Any) -> None:
    """Build the section of a key without the rest of a configuration, which is faster."""
    for name, schema in DENOISERS.items():
        if key.startswith(f"{name}."):
            build(schema, {key.removeprefix(f"{name}."): value}, Origin(), f"{name}.")
            return
    if key.startswith("stage_1.params."):
        name = key.removeprefix("stage_1.params.")
        build(RAEParams, {name: value}, Origin(), "stage_1.params.")
        return
    build(RunConfig, nested(key, value), Origin())


@pytest.mark.parametrize("key", NUMERIC)
def test_numbers(key):
    for value in VALUES:
        for length in shapes(NUMERIC[key]):
            given = shaped(value, length, key)
            if accepts(key, value):
                build_section(key, given)
                continue
            with pytest.raises(UserError) as error:
                build_section(key, given)
            message = str(error.value)
            assert message.startswith(f"{key} ("), message
            assert ": expected " in message
            assert ", got " in message


def load_cases() -> list[tuple[str, Any]]:
    """Return overrides of keys that a file without models has, with values they cannot take."""
    keys = [key for key in NUMERIC if not key.startswith(("rae_xla.", "stage_1."))]
    texts = {NAN: ".nan", INFINITY: ".inf", -INFINITY: "-.inf"}
    return [
        (key, shaped(texts.get(value, value), shapes(NUMERIC[key])[0], key))
        for key in keys
        for value in VALUES
        if not accepts(key, value)
    ]


def check_load(cases: list[tuple[str, Any]]) -> None:
    for key, value in cases:
        text = str(value).replace("'", "")
        with pytest.raises(UserError) as error:
            load_config(None, [f"{key}={text}"])
        assert str(error.value).startswith(f"{key} (on the command line)"), f"{key}={text}"


def test_a_sample_of_them_in_a_complete_configuration():
    check_load(random.Random(0).sample(load_cases(), 30))


@pytest.mark.nightly
def test_all_of_them_in_a_complete_configuration():
    check_load(load_cases())


@pytest.mark.parametrize("key", [k for k in PATHS if not k.startswith("rae_xla.")])
def test_paths(key, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    many = key == "mesh.sharding"

    def parsed(text: str) -> str:
        value: Any = [text] if many else text
        if key.startswith("stage_1.params."):
            name = key.removeprefix("stage_1.params.")
            section: Any = build(RAEParams, {name: value}, Origin(), "stage_1.params.")
            found = getattr(section, name)
        else:
            tree = nested(key, value)
            for section in ("stage_1", "stage_2"):
                if section in tree:
                    tree[section]["target"] = "RAE"
            guide = tree.get("guidance", {}).get("guidance_model")
            if guide:
                guide["target"] = "RAE"
            found = build(RunConfig, tree, Origin())
            for name in key.split("."):
                found = getattr(found, name)
        return found[0] if many else found

    assert parsed("~/x") == f"{tmp_path}/x"
    assert parsed(str(tmp_path)) == str(tmp_path)
    refused = ["None", "null", "", "s3://bucket/x", "gs:/bucket/x", "gs://", "a\0b"]
    if PATHS[key].remote:
        assert parsed("gs://bucket//x/") == "gs://bucket/x"
    else:
        refused.append("gs://bucket/x")
    for text in refused:
        with pytest.raises(UserError) as error:
            parsed(text)
        assert str(error.value).startswith(f"{key} ("), str(error.value)


MODEL = "stage_1={target: RAE, params: {encoder_params: {%s}}}"
IMPOSSIBLE = {
    "transport.params.time_dist_type": (
        "normal", "logit-normal_0", "logit-normal_nan_1", "logit-normal_inf_1", "logit-normal_0_0",
        "logit-normal_0_-1", "logit-normal_0_1e400", "logit-normal_1e30_1", "logit-normal_0.1.2_1",
    ),
    "sampler.params.sampling_method": ("eule", "text", "-1"),
    "sampler.params.diffusion_form": ("text",),
    "sampler.params.last_step": ("text", "0.5"),
    "training.optimizer.matrices": ("[]", "['(']", "['a', '*']"),
    "text_to_image.language_model_optimizer.matrices": ("['[']",),
    "gan.disc.arch.recipe": ("{depth: .nan}", "{depth: 1" + "0" * 400 + "}", "{a: {b: [-.inf]}}"),
    "text_to_image.train": ("[]",),
    "text_to_image.prompt.layers": ("[]",),
    "text_to_image.row_pattern": ("[1, 5]",),
    "text_to_image.head.num_heads": ("7",),
    "text_to_image.captions.sources": ("[]",),
    "text_to_image.captions.prompts": ("[]", "['a cat']"),
    "text_to_image.captions.weights": ("[1]", "[0, 0, 0, 0]"),
    "text_to_image.language_model_config": (
        "{rms_norm_eps: .nan}", "{hidden_size: 0}", "{vocab_size: -1}", "{head_dim: text}",
        "{num_hidden_layers: 1.5}", "{num_attention_heads: 1e30}", "{intermediate_size: null}",
        "{hidden_size: 48, num_attention_heads: 5}",
    ),
    "repa.encoder_params": ("{norm_eps: 0}", "{dinov2_path: None}", "{model_name: 's3://b/x'}"),
}  # fmt: skip
"""Values whose type is right: names, patterns and sections without a schema."""


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_values_that_are_more_than_their_type(key):
    for value in IMPOSSIBLE[key]:
        with pytest.raises(UserError) as error:
            load_config(None, [f"{key}={value}"])
        assert str(error.value).startswith(f"{key}"), f"{key}={value}"
        assert "(on the command line)" in str(error.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("norm_eps", ("-1", "0", ".nan", "text", "true")),
        ("layers", ("[-1]", "[.inf]", "[a]", "text")),
        ("input_size", ("0", "-8", ".nan")),
        ("normalize", ("3", "null", "text")),
        ("model_name", ("None", "gs://b/x")),
        ("something", (".nan", "[[.inf]]", "{a: .nan}")),
    ],
)
def test_arguments_of_an_encoder(name, values):
    key = f"stage_1.params.encoder_params.{name}"
    for value in values:
        with pytest.raises(UserError) as error:
            load_config(None, [MODEL % f"{name}: {value}"])
        assert str(error.value).startswith(key), str(error.value)


def test_the_names_are_those_of_the_transport():
    from rae_xla.transport import ode, sde

    assert (*ode.FIXED_STEP, *ode.ADAPTIVE, *ode.MULTISTEP) == free_form.ODE_METHODS
    assert free_form.SDE_METHODS == sde.METHODS
    assert free_form.DIFFUSION_FORMS == sde.FORMS
    assert free_form.LAST_STEPS == sde.LAST_STEPS
    for form in (*sde.FORMS, *sde._PUBLISHED_SPELLING, "sbdm"):
        load_config(None, [f"sampler.params.diffusion_form={form}"])


def test_the_mode_decides_which_methods_there_are():
    load_config(None, ["sampler.mode=ODE", "sampler.params.sampling_method=dopri5"])
    with pytest.raises(UserError, match="expected one of euler, heun in SDE mode, got dopri5"):
        load_config(None, ["sampler.mode=SDE", "sampler.params.sampling_method=dopri5"])


RAEV2 = {
    "stage_1.params.resolution": "stage_1={target: RAE, params: {encoder_name: dinov3-vit-l16, "
    "resolution: %s}}",
    "stage_1.params.encoder_name": "stage_1={target: RAE, params: {encoder_name: %s}}",
    "stage_1": "stage_1=%s",
    "stage_2.params": "stage_2={target: DiTwDDTHeadIG, params: %s}",
    "conditioning": "conditioning=%s",
    "conditioning.arch": "conditioning={arch: %s}",
    "guidance.ig": "guidance={ig: %s}",
    "guidance.ig.scale": "guidance={ig: {scale: %s}}",
    "guidance.ig.unconditional_scale": "guidance={ig: {unconditional_scale: %s}}",
    "repa.target_encoder": "repa={use_repa: true, target_encoder: %s}",
    "repa.target_encoder_resolution": "repa={use_repa: true, target_encoder_resolution: %s}",
    "transport": "transport=%s",
    "sampler": "sampler=%s",
    "eval.datasets": "eval={datasets: %s}",
    "eval.datasets.a": "eval={datasets: {a: %s}}",
    "eval.datasets.a.metrics": "eval={datasets: {a: {metrics: %s}}}",
}
"""Keys of RAEv2, which are translated before the schema checks them."""


@pytest.mark.parametrize("key", RAEV2)
def test_keys_that_are_translated(key):
    for text in (".nan", "-.inf", "-1", "1" + "0" * 400, "[.nan]"):
        with pytest.raises(UserError) as error:
            load_config(None, ["stage_2={target: DiTwDDTHeadIG}", RAEV2[key] % text])
        assert str(error.value).startswith(f"{key} (on the command line)"), f"{key}={text}"


@pytest.mark.parametrize("key", ["data", "training", "training.optimizer", "text_to_image.head"])
def test_a_list_in_place_of_a_section(key, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "training: {optimizer: {lr: 1e-3}}\ndata: {train: a}\ntext_to_image: {head: {}}"
    )
    (tmp_path / "above.yaml").write_text(yaml.safe_dump({"base": "run.yaml", **nested(key, [1])}))
    for given in ((None, [f"{key}=[1]"]), (path, [f"{key}=[1]"]), (tmp_path / "above.yaml", [])):
        with pytest.raises(UserError, match=rf"^{re.escape(key)} \(.*expected a section"):
            load_config(*given)


def test_a_rate_that_is_proportional_to_zero():
    muon = ["training.optimizer.type=muon", "training.optimizer.adamw_lr=1e-3"]
    for rate in ("training.optimizer.lr=0", "training.scheduler.base_lr=0"):
        with pytest.raises(UserError, match=r"^training\.optimizer\.adamw_lr .* which is 0"):
            load_config(None, [*muon, rate])
