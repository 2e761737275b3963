"""Any vision transformer of transformers as an encoder, by one generic class.

The forward pass is that of transformers. What it would do in each forward pass for another image
size than that of its training, resampling its position table, is done once: the model is built
for the input size. XLA has no bicubic resize, and would fall back to the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from rae_xla.errors import UserError, did_you_mean
from rae_xla.models.encoders.backbone import square_side
from rae_xla.models.encoders.frozen import FrozenEncoder
from rae_xla.models.encoders.fusion import LayerFusion, make_fusion
from rae_xla.models.hf_folder import is_hub_id, read_json
from rae_xla.models.weights import load_strict
from rae_xla.ops.normalization import LayerNorm

FINAL_NORMS = ("plain", "model", "none")
# Names of the norm after the last block in the models of transformers.
_NORM_NAMES = ("layernorm", "norm", "post_layernorm", "ln_post", "layer_norm")
# Vision tower of a model with several -> model type of the tower.
_TOWERS = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}
# Models that are used through the class of another model, with the same parameters. ViT-MAE's own
# class masks and permutes its tokens.
_SAME_TRUNK = {"vit_mae": "vit"}
# transformers resamples the position table of this model with antialiasing.
_ANTIALIASED = ("dinov2_with_registers",)


class HFVisionEncoder(FrozenEncoder):
    """A vision transformer of transformers, with layer fusion; tested models: docs/stage1.md.

    Args:
        model_name: local model folder or hub id; or, on the meta device, the configuration of the
            vision model.
        input_size: side of the images in pixels; by default that of the model's training.
        layers: blocks, counted from 0, whose normalised outputs are combined; None for the last
            one alone.
        fusion: ``mean`` or ``sum`` of the layers.
        token_mean: add the mean over all patch tokens of the last layer to every token.
        final_norm: what normalises the output of a block: ``plain``: a layer norm without an affine
            map; ``model``: the model's own final norm; ``none``.
        drop_tokens: number of tokens before the patch tokens, which are dropped; by default it
            follows from the number of tokens.

    Raises:
        UserError: the folder is missing, is not such a model, or an option does not fit it.
    """

    def __init__(
        self,
        model_name: str | Mapping[str, Any],
        input_size: int | None = None,
        layers: Sequence[int] | None = None,
        fusion: str = "mean",
        token_mean: bool = False,
        final_norm: str = "plain",
        drop_tokens: int | None = None,
    ) -> None:
        if final_norm not in FINAL_NORMS:
            raise UserError(
                f"final_norm: {final_norm!r} is not one of {', '.join(FINAL_NORMS)}"
                f"{did_you_mean(final_norm, FINAL_NORMS)}"
            )
        config = _vision_config(model_name)
        trained_size = square_side(config.image_size, "image_size")
        patch = square_side(config.patch_size, "patch_size")
        size = input_size or trained_size
        super().__init__(config.to_dict(), config.hidden_size, patch)
        self.num_patches = (size // patch) ** 2
        if self.num_patches < 1:
            raise UserError(f"input_size {size} is smaller than a patch ({patch} pixels)")
        self.drop_tokens = drop_tokens
        self.fusion: LayerFusion | None = make_fusion(layers, fusion, token_mean)
        config.image_size = size
        self.model = _build(config)
        if not isinstance(model_name, Mapping):
            config.image_size = trained_size
            load_resampled(self.model, _pretrained(model_name, config), trained_size, size, patch)
            config.image_size = size
        elif not next(self.model.parameters()).is_meta:
            raise UserError(
                "an encoder that is given by its configuration has no weights: give a model "
                "folder, or build the encoder on the meta device and load its weights"
            )
        else:
            _materialise_tables(self.model, config)
        blocks = _blocks(self.model, config.num_hidden_layers)
        if self.fusion is not None:
            self.fusion.check(len(blocks))
            self.register_buffer("fusion_code", self.fusion.code())
        self._norm = _final_norm(final_norm, self.model, config)
        self.requires_grad_(False)
        self.train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images (B, 3, H, W) to patch tokens (B, N, hidden_size), row by row."""
        blocks = _blocks(self.model, self.config["num_hidden_layers"])
        layers = (len(blocks) - 1,) if self.fusion is None else self.fusion.layers
        with _recorded_outputs([blocks[layer] for layer in layers]) as outputs:
            self.model(pixel_values=images)
        tokens = [self._patch_tokens(self._norm(outputs[blocks[layer]])) for layer in layers]
        return tokens[0] if self.fusion is None else self.fusion.combine(tokens)

    def _patch_tokens(self, tokens: Tensor) -> Tensor:
        extra = tokens.shape[1] - self.num_patches
        if extra < 0 or self.drop_tokens not in (None, extra):
            raise UserError(
                f"encoder_params: the encoder has {tokens.shape[1]} tokens for "
                f"{self.num_patches} patches"
                + (f", but drop_tokens is {self.drop_tokens}" if self.drop_tokens else "")
                + "; leave drop_tokens out, or choose an encoder with a token for every patch"
            )
        return tokens[:, extra:]


@contextlib.contextmanager
def _recorded_outputs(blocks: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Record the outputs of blocks.

    ``output_hidden_states`` of transformers is not used: depending on the model and the version,
    its last element is normalised.
    """
    outputs: dict[nn.Module, Tensor] = {}

    def record(block: nn.Module, _: Any, output: Any) -> None:
        outputs[block] = output[0] if isinstance(output, tuple) else output

    handles = [block.register_forward_hook(record) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _vision_config(source: str | Mapping[str, Any], *, vision_transformer: bool = True) -> Any:
    """Return the configuration of the vision tower, as transformers parses it."""
    values = dict(source) if isinstance(source, Mapping) else read_json(source, "config.json")
    if values is None:
        raise UserError(f"the encoder folder {source} has no config.json")
    kind = values.get("model_type")
    if "vision_config" in values:
        kind = values["vision_config"].get("model_type", _TOWERS.get(str(kind)))
        values = values["vision_config"]
    kind = _SAME_TRUNK.get(str(kind), kind)
    values = {k: v for k, v in values.items() if k not in ("model_type", "architectures", "dtype")}
    try:
        config = AutoConfig.for_model(str(kind), **values)
    except (TypeError, ValueError) as error:
        raise UserError(f"the encoder {source} has a config.json that transformers does not read: "
                        f"{' '.join(str(error).split())}") from error  # fmt: skip
    required = ("hidden_size", "patch_size", "image_size", "num_hidden_layers")
    for name in required if vision_transformer else ():
        if not hasattr(config, name):
            raise UserError(
                f"the encoder {source} of type {kind} is not a vision transformer: its config.json "
                f"has no {name}"
            )
    if kind == "siglip_vision_model":
        config.vision_use_head = False
    return config


def _build(config: Any) -> nn.Module:
    options: dict[str, Any] = {}
    if config.model_type == "vit":
        options["add_pooling_layer"] = False
    if hasattr(config, "num_attention_heads"):
        options["attn_implementation"] = "sdpa"
    model: nn.Module = AutoModel.from_config(config, **options)
    return model


def _pretrained(folder: str, config: Any) -> Mapping[str, Tensor]:
    """Return the state dict of a saved model, whatever version of transformers saved it."""
    options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
    model_class: Any = type(_meta_model(config))
    model, report = model_class.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        local_files_only=not is_hub_id(folder),
        output_loading_info=True,
        **options,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"the weights in {folder} do not fit its config.json: {len(missing)} tensors are "
            f"missing, such as {missing[0]}"
        )
    state: Mapping[str, Tensor] = model.state_dict()
    return state


def _meta_model(config: Any) -> nn.Module:
    with torch.device("meta"):
        return _build(config)


def load_vision_model(
    folder: str,
    size: int | None = None,
    *,
    antialias: bool = False,
    head: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load the vision model of a folder as transformers has it, frozen, in eval mode.

    Args:
        folder: local model folder or hub id.
        size: side of the images in pixels, rounded up to complete patches; None: a model without
            a position table.
        antialias: how the position table is resampled for that size.
        head: keep the attention pooling of SigLIP.
        changes: settings of its configuration to replace.

    Raises:
        UserError: the folder is missing or is not such a model.
    """
    config = _vision_config(folder, vision_transformer=size is not None)
    for name, value in (changes or {}).items():
        setattr(config, name, value)
    if head:
        config.vision_use_head = True
    state = _pretrained(folder, config)
    if size is None:
        model = _build(config)
        load_strict(model, state, f"the weights in {folder}")
    else:
        trained_size = square_side(config.image_size, "image_size")
        patch = square_side(config.patch_size, "patch_size")
        config.image_size = -(-size // patch) * patch
        model = _build(config)
        load_resampled(model, state, trained_size, config.image_size, patch, antialias=antialias)
    return model.eval().requires_grad_(False)


def load_resampled(
    model: nn.Module,
    state: Mapping[str, Tensor],
    trained_size: int,
    size: int,
    patch: int,
    *,
    antialias: bool | None = None,
) -> None:
    """Load weights into a model for another image size; its position table is resampled.

    Args:
        model: for images of side ``size``.
        state: weights for images of side ``trained_size``.
        trained_size: see ``state``.
        size: see ``model``.
        patch: side of a patch.
        antialias: how to resample; None: as transformers does for this model.
    """
    own = model.state_dict()
    config: Any = model.config
    if antialias is None:
        antialias = config.model_type in _ANTIALIASED
    state = {
        name: _resample(tensor, trained_size // patch, size // patch, antialias)
        if name in own and "position_embedding" in name and own[name].shape != tensor.shape
        else tensor
        for name, tensor in state.items()
    }
    load_strict(model, state, "the encoder's weights")


def _resample(table: Tensor, old: int, new: int, antialias: bool) -> Tensor:
    """Resample a position table (1, extra + old², C) or (extra + old², C) bicubically."""
    rows = table.reshape(-1, table.shape[-1])
    extra, grid = rows[: len(rows) - old**2], rows[len(rows) - old**2 :]
    image = grid.float().T.reshape(1, -1, old, old)
    image = F.interpolate(image, size=(new, new), mode="bicubic", antialias=antialias)
    resampled = torch.cat([extra, image[0].flatten(1).T.to(rows)])
    return resampled.reshape(*table.shape[:-2], *resampled.shape)


def _materialise_tables(model: nn.Module, config: Any) -> None:
    """Give the buffers outside of the state dict, such as rotary frequencies, their values.

    They are those of a model with one block: blocks have no such buffers.
    """
    depth = config.num_hidden_layers
    config.num_hidden_layers = 1
    with torch.device("cpu"):
        tables = dict(_build(config).named_buffers())
    config.num_hidden_layers = depth
    for name, buffer in list(model.named_buffers()):
        if name in tables and buffer.is_meta:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, tables[name])


def _blocks(model: nn.Module, count: int) -> nn.ModuleList:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(
        f"the encoder {type(model).__name__} has no list of {count} blocks: HFVisionEncoder "
        "requires a plain vision transformer"
    )


def _final_norm(kind: str, model: nn.Module, config: Any) -> nn.Module:
    """Return the module that normalises the output of a block."""
    if kind == "none":
        return nn.Identity()
    if kind == "plain":
        eps = getattr(config, "layer_norm_eps", 1e-6)
        return LayerNorm(config.hidden_size, eps=eps, elementwise_affine=False)
    found = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _NORM_NAMES and not any(c.isdigit() for c in name)
    ]
    if len(found) != 1:
        raise UserError(
            f"final_norm: the final norm of {type(model).__name__} is not known; choose plain or "
            "none"
        )
    return _Shared(found[0])


class _Shared(nn.Module):
    """Calls a module that belongs to another one, without registering its parameters again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._modules_of_other = (module,)  # a tuple, which torch does not register

    def forward(self, x: Tensor) -> Tensor:
        """Call the other module."""
        result: Tensor = self._modules_of_other[0](x)
        return result
