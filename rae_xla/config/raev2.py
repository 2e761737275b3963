"""Files of RAEv2 (nanovisionx/RAEv2): translation of their keys to ours while a file is loaded.

They differ from those of RAE in flat ``transport`` and ``sampler`` sections, an encoder that is
given by a name, a ``conditioning`` section, and in what their classes always do.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rae_xla.config.encoder_names import NamedEncoder, parse_encoder_name
from rae_xla.config.geometry import encoder_geometry
from rae_xla.config.ranges import COUNT, Range
from rae_xla.config.typed import Origin, check_value
from rae_xla.errors import UserError

logger = logging.getLogger(__name__)

Tree = dict[str, Any]

# What the transformers of RAEv2 always have.
_TRANSFORMER = {"conditioning": "tokens", "use_qknorm": True, "use_pos_embed": False}
_TRANSPORT_KEYS = ("prediction", "time_dist_type", "t_eps")
_METRICS = {"fid": "fid", "inception_score": "is", "psnr": "psnr", "ssim": "ssim",
            "lpips": "lpips", "rfid": "rfid", "fdr6": "fdr6"}  # fmt: skip
_SCALE = Annotated[float | None, "guidance scale", Range(least=0, most=1000)]
_SECTION = dict[str, Any] | None
_TYPES: dict[str, Any] = {
    **dict.fromkeys(
        ("stage_1", "stage_1.params", "stage_2", "stage_2.params", "transport", "sampler", "misc",
         "guidance", "guidance.cfg", "guidance.ig", "internal_guidance", "repa", "training", "eval",
         "eval.datasets", "conditioning", "conditioning.arch"),
        _SECTION,
    ),
    "stage_1.params.encoder_name": str,
    "stage_1.params.resolution": Annotated[int, "side of the images", COUNT],
    "guidance.ig.scale": _SCALE,
    "guidance.ig.unconditional_scale": _SCALE,
    "repa.target_encoder": str,
    "repa.target_encoder_resolution": Annotated[int, "side of the images", COUNT],
}  # fmt: skip
"""Types of the values that the translation reads; ``build`` checks what it returns."""
# Keys without a meaning here, and sections whose content is configured elsewhere.
_IGNORED_TRAINING = ("virtual_epoch_steps", "eval_dir")


def is_raev2(tree: Tree) -> bool:
    """Return whether settings have keys that only files of RAEv2 have."""
    stage_1 = _section(tree, "stage_1", "params")
    target = str(_section(tree, "stage_2").get("target", ""))
    return "encoder_name" in stage_1 or "conditioning" in tree or target.endswith("IG")


def translate_raev2(tree: Tree, where: str) -> Tree:
    """Return settings of RAEv2 under our keys; others unchanged.

    Args:
        tree: settings as read, without dashes in keys.
        where: source of the settings, for messages.

    Raises:
        UserError: the file needs something that is not supported.
    """
    if not is_raev2(tree):
        return tree
    tree = _resolved(tree, where)
    _check_types(tree, where)
    conditioning = tree.pop("conditioning", None) or {}
    if conditioning.get("type", "label") != "label":
        raise UserError(
            f"conditioning.type ({where}) is {conditioning['type']}: of the models of RAEv2 only "
            "class-conditional ones are supported (type label)"
        )
    if "stage_1" in tree:
        tree["stage_1"] = _stage_1(tree["stage_1"])
    if tree.get("stage_2") is not None:
        tree["stage_2"] = _stage_2(tree, conditioning, where)
    _flat_sections(tree)
    if "guidance" in tree:
        tree["guidance"] = translate_guidance(tree["guidance"])
    _internal_guidance_and_repa(tree)
    _training(tree)
    ignored = [key for key in ("dataset",) if tree.pop(key, None) is not None]
    ignored += _evaluation(tree)
    if ignored:
        logger.warning(
            "%s (%s) of RAEv2 cannot be translated and is ignored: configure data.train and eval",
            ", ".join(ignored),
            where,
        )
    return tree


def _resolved(tree: Tree, where: str) -> Tree:
    """Return a copy whose ``${...}`` are resolved: they may refer to keys that are translated."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(f"settings of RAEv2 {where}: {reason}") from error
    return cast("Tree", resolved)


def _check_types(tree: Tree, where: str) -> None:
    """Raise ``UserError`` if a value that the translation reads has another type or range."""
    origin = Origin(where.removeprefix("in ") if where.startswith("in ") else None)
    for key, hint in _TYPES.items():
        *path, leaf = key.split(".")
        if leaf in (section := _section(tree, *path)):
            check_value(section[leaf], hint, key, origin)
    datasets = _section(tree, "eval", "datasets")
    for name, values in datasets.items():
        check_value(values, _SECTION, f"eval.datasets.{name}", origin)
        metrics = (values or {}).get("metrics")
        check_value(metrics, tuple[str, ...] | None, f"eval.datasets.{name}.metrics", origin)


def translate_guidance(guidance: Tree | None) -> Tree | None:
    """Return a guidance section of RAEv2, with sections ``cfg`` and ``ig``, under our keys."""
    if not guidance or "method" in guidance or not {"ig", "cfg"} & guidance.keys():
        return guidance
    cfg, internal = dict(guidance.get("cfg") or {}), dict(guidance.get("ig") or {})
    if (internal.get("scale") or 1.0) > 1 or internal.get("unconditional_scale") not in (
        None,
        1,
        1.0,
    ):
        return {"method": "internal", **internal, "cfg": cfg}
    return {"method": "cfg", **cfg}


def _stage_1(stage_1: Tree | None) -> Tree | None:
    params = dict((stage_1 or {}).get("params") or {})
    if stage_1 is None or "encoder_name" not in params:
        return stage_1
    encoder = parse_encoder_name(params.pop("encoder_name"), params.pop("resolution", 256))
    translated = {
        "encoder_cls": encoder.encoder_cls,
        "encoder_config_path": encoder.hub_id,
        "encoder_input_size": encoder.input_size,
        "encoder_params": encoder.options,
        "decoder_output": "pixels",
        "image_mean": list(encoder.image_mean),
        "image_std": list(encoder.image_std),
    }
    return {**stage_1, "params": translated | params}


def _stage_2(tree: Tree, conditioning: Tree, where: str) -> Tree:
    stage_2 = dict(tree["stage_2"])
    params = dict(stage_2.get("params") or {})
    if params.pop("use_cfg_conds", False):
        raise UserError(f"stage_2.params.use_cfg_conds ({where}) is not supported: write false")
    arch = conditioning.get("arch") or {}
    defaults: Tree = _TRANSFORMER | {
        key: arch[key] for key in ("num_t_tokens", "num_c_tokens") if key in arch
    }
    if "cfg_dropout_prob" in conditioning:
        defaults["class_dropout_prob"] = conditioning["cfg_dropout_prob"]
    if "num_classes" in _section(tree, "misc"):
        defaults["num_classes"] = tree["misc"]["num_classes"]
    target = str(stage_2.get("target", ""))
    if target.endswith("IG"):
        # Under this name a configuration that is saved would be taken for one of RAEv2.
        stage_2["target"] = target.removesuffix("IG")
        given = _section(tree, "internal_guidance").get("base_model_depth")
        defaults["base_model_depth"] = 8 if given is None else given
    repa = _section(tree, "repa")
    if not (params.pop("enable_repa", False) or repa.get("use_repa")):
        params.pop("repa_layer_depth", None)
        params.pop("z_dim", None)
    else:
        if "repa_layer_depth" in repa:  # the published code takes it from there
            params["repa_layer_depth"] = repa["repa_layer_depth"]
        defaults["repa_layer_depth"] = 8
        geometry = encoder_geometry(_repa_encoder(repa).hub_id)
        if geometry is not None:
            defaults["z_dim"] = geometry.channels
    stage_2["params"] = defaults | params
    return stage_2


def _flat_sections(tree: Tree) -> None:
    """Move the keys of flat sections to ``params``, with what RAEv2 always does."""
    transport = tree.get("transport") or {}
    if "params" not in transport:
        given = {key: transport[key] for key in _TRANSPORT_KEYS if key in transport}
        tree["transport"] = {"params": {"t_eps": 0.05, "truncate_times": False} | given}
    sampler = tree.get("sampler") or {}
    if "params" not in sampler:
        tree["sampler"] = {"params": {"num_steps": sampler.get("num_steps", 50), "end": 0.0}}


def _internal_guidance_and_repa(tree: Tree) -> None:
    internal = dict(tree.pop("internal_guidance", None) or {})
    internal.pop("base_model_depth", None)
    if internal:
        tree["internal_guidance"] = internal
    repa = dict(tree.pop("repa", None) or {})
    if repa.get("use_repa"):
        encoder = _repa_encoder(repa)
        tree["repa"] = {
            "coeff": repa.get("repa_coeff", 0.5),
            "encoder_cls": encoder.encoder_cls,
            "encoder_config_path": encoder.hub_id,
            "encoder_input_size": encoder.input_size,
            "encoder_params": encoder.options,
        }


def _repa_encoder(repa: Tree) -> NamedEncoder:
    name = repa.get("target_encoder", "dinov2-vit-b")
    return parse_encoder_name(name, repa.get("target_encoder_resolution", 256))


def _training(tree: Tree) -> None:
    training = tree.get("training")
    if not isinstance(training, dict):
        return
    for key in _IGNORED_TRAINING:
        training.pop(key, None)
    side = training.pop("image_size", None)
    if side is not None:
        tree["data"] = {"image_size": side} | _section(tree, "data")
    optimizer = training.get("optimizer")
    if isinstance(optimizer, dict):
        optimizer = dict(optimizer)
        optimizer.pop("ns_use_kernels", None)
        if str(optimizer.get("type", "")).lower() == "gmuon":
            optimizer["type"] = "muon"
        preset = optimizer.pop("ns_coefficients_preset", None)
        if preset is not None:
            optimizer["preset"] = str(preset).removesuffix("_COEFFICIENTS").lower()
        training["optimizer"] = optimizer


def _evaluation(tree: Tree) -> list[str]:
    """Translate the first data set of ``eval``; return the keys that are ignored."""
    section = tree.get("eval")
    if not isinstance(section, dict) or "datasets" not in section:
        return []
    datasets = section.pop("datasets") or {}
    section.pop("eval_dir", None)
    ignored = [f"eval.datasets.{name}" for name in list(datasets)[1:]]
    for name, values in [(name, values or {}) for name, values in datasets.items()][:1]:
        metrics = [_METRICS[m] for m in values.get("metrics") or () if m in _METRICS]
        ignored += [f"eval.datasets.{name}.metrics.{m}" for m in values.get("metrics") or ()
                    if m not in _METRICS]  # fmt: skip
        if metrics:
            section["metrics"] = metrics
        if "reference_npz" in values:
            section["reference_npz_path"] = values["reference_npz"]
        if "num_samples" in values:
            section["num_samples"] = values["num_samples"]
    return ignored


def _section(tree: Tree, *names: str) -> Tree:
    """Return a section, or {} if there is none."""
    for name in names:
        inner = tree.get(name)
        tree = inner if isinstance(inner, dict) else {}
    return tree
