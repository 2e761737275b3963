"""Language models of transformers, run by transformers' own code on ready-made masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rae_xla.errors import UserError
from rae_xla.models.intermediate_heads import mark_read_blocks

# Model types whose attention is bidirectional. They have no next-token head here.
ENCODER_TYPES = ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "modernbert")


def read_lm_config(source: str | Path | Mapping[str, Any]) -> Any:
    """Read the configuration of a language model, as transformers parses it.

    Args:
        source: a model folder, a hub id, or the content of a ``config.json``.

    Raises:
        UserError: the configuration is missing or not valid.
    """
    try:
        if isinstance(source, Mapping):
            values = dict(source)
            return AutoConfig.for_model(values.pop("model_type"), **values)
        return AutoConfig.from_pretrained(str(source))
    except KeyError as error:
        raise UserError(
            f"the configuration of the language model has no {error}: give the content of a "
            "config.json of transformers"
        ) from error
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the language model {source} cannot be read ({reason}): give a folder that "
            "transformers' save_pretrained wrote, or a hub id such as Qwen/Qwen2.5-1.5B-Instruct"
        ) from error


class LanguageModel(nn.Module):
    """A language model: token embeddings, transformer and, for a causal one, next-token logits.

    A model with tied embeddings has no ``head``: the logits are computed with the embedding table,
    which therefore is one parameter wherever it is moved, sharded or saved.

    Args:
        config: of transformers, see :func:`read_lm_config`.

    Attributes:
        config: of transformers.
        is_causal: whether a token only sees earlier tokens.
        prefix: what precedes the names of ``base`` in transformers' checkpoints.

    Raises:
        UserError: the model has attention windows, or transformers does not know its type.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.is_causal = config.model_type not in ENCODER_TYPES
        auto = AutoModelForCausalLM if self.is_causal else AutoModel
        try:
            model = auto.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        except ValueError as error:
            raise UserError(
                f"transformers has no language model of type {config.model_type!r}: choose a "
                "causal model such as Qwen2, Qwen3 or Llama, or an encoder such as BERT"
            ) from error
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise UserError(
                f"the language model ({config.model_type}) has layers with an attention window, "
                "for which no mask is prepared: choose a model with full attention"
            )
        self.prefix = f"{model.base_model_prefix}." if self.is_causal else ""
        self.set_base(model.base_model)
        tied = bool(config.tie_word_embeddings)
        self.head = model.get_output_embeddings() if self.is_causal and not tied else None

    def set_base(self, base: nn.Module) -> None:
        """Set the transformer, of the configuration of this model."""
        if getattr(base, "pooler", None) is not None:
            # Of BERT and its kind: it is not used, so it would have no gradient.
            base.pooler = None  # type: ignore[assignment]
        # Only transformers' newer classes take another attention; all causal models here are new.
        self.causal_attention = self.is_causal and bool(base._supports_attention_backend)
        if self.causal_attention:
            # Imported here because it is slow to import and only needed for a model.
            from rae_xla.models.text_to_image.language_attention import ATTENTION

            base.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        self.base: Any = base

    @property
    def hidden_size(self) -> int:
        """Channels of a hidden state."""
        return int(self.config.hidden_size)

    @property
    def embedding(self) -> nn.Embedding:
        """The table of token embeddings."""
        return self.base.get_input_embeddings()

    @property
    def output_weight(self) -> Tensor:
        """The matrix (vocabulary, hidden_size) that gives the logits of hidden states."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return the final hidden states (B, L, hidden_size).

        Args:
            embeddings: of the tokens, (B, L, hidden_size).
            padding: (B, L) bool, true for tokens that no token may attend to. A causal model does
                not need it for padding on the right.
        """
        return self._run(embeddings, padding).last_hidden_state

    def layer_states(self, ids: Tensor, padding: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Return the hidden states (B, L, hidden_size) after some layers.

        Args:
            ids: of the tokens, (B, L).
            padding: (B, L) bool, true for tokens that no token may attend to.
            layers: 0 is the embeddings, i the output of layer i, -1 the final states. As in
                transformers, the states of the last layer are normalised.
        """
        embeddings = self.embedding(ids)
        if all(layer in (-1, self.config.num_hidden_layers) for layer in layers):
            return [self(embeddings, padding)] * len(layers)
        states = self._run(embeddings, padding, output_hidden_states=True).hidden_states
        return [states[layer] for layer in layers]

    def mark_read_layers(self, layers: Sequence[int]) -> None:
        """Mark the blocks whose output ``layer_states`` returns; see ``mark_read_blocks``."""
        count = self.config.num_hidden_layers
        if max(layers) > count:
            raise UserError(
                f"text_to_image.prompt.layers: {max(layers)}, but the language model has {count} "
                "layers: write 0 to the number of its layers, or -1"
            )
        depths = [layer if layer >= 0 else count + 1 + layer for layer in layers]
        for name in ("layers", "encoder.layer", "transformer.layer"):  # BERT, DistilBERT
            parent, _, own = name.rpartition(".")
            blocks = getattr(getattr(self.base, parent, None) if parent else self.base, own, None)
            if blocks is not None:
                mark_read_blocks(list(blocks), *(depth for depth in depths if 0 < depth < count))
                return

    def continue_from(
        self, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: Any | None
    ) -> Tensor:
        """Return the final hidden states (B, n, hidden_size) of tokens that follow cached ones.

        Args:
            embeddings: of the new tokens, (B, n, hidden_size).
            mask: (B, 1, n, cached + n) bool, true where attention is allowed.
            positions: of the new tokens in their sequences, (B, n).
            cache: keys and values of the earlier tokens, updated in place; None: there are none.
        """
        return self.base(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def reset_constants(self) -> None:
        """Compute the tables that are in no state dict, after the model was built without storage.

        These are the frequencies of rotary embeddings, and position numbers.
        """
        for name, module in list(self.base.named_modules()):
            if any(key == "inv_freq" for key, _ in module.named_buffers(recurse=False)):
                with torch.device("cpu"):
                    fresh = type(module)(config=self.config)
                parent, _, own = name.rpartition(".")
                setattr(self.base.get_submodule(parent), own, fresh)
            elif "position_ids" in module._buffers:
                count = module._buffers["position_ids"].shape[-1]
                module.position_ids = torch.arange(count, device="cpu")[None]
                if "token_type_ids" in module._buffers:
                    module.token_type_ids = torch.zeros(1, count, dtype=torch.int64, device="cpu")

    def _run(self, embeddings: Tensor, padding: Tensor | None, **options: Any) -> Any:
        length, device = embeddings.shape[1], embeddings.device
        if self.is_causal:
            options |= {
                "use_cache": False,
                "position_ids": torch.arange(length, device=device)[None],
            }
            if self.causal_attention and padding is None:
                options["only_causal"] = True
        mask = attention_mask(length, padding, self.is_causal, device)
        return self.base(inputs_embeds=embeddings, attention_mask=mask, **options)


def attention_mask(
    length: int, padding: Tensor | None, is_causal: bool, device: torch.device
) -> Tensor:
    """Return which token sees which, (B or 1, 1, L, L) bool, true where attention is allowed.

    transformers computes a mask from a (B, L) one by reading it on the host, which would wait for
    the device in every step; it uses a mask of this shape as it is. A padding token sees itself, so
    that no row of the attention matrix is empty.

    Args:
        length: L.
        padding: (B, L) bool, true for tokens that no other token may attend to.
        is_causal: whether a token only sees earlier tokens and itself.
        device: of the mask.
    """
    position = torch.arange(length, device=device)
    allowed = position[:, None] >= (position if is_causal else 0 * position)
    mask = allowed[None, None]
    if padding is not None:
        itself = position[:, None] == position
        mask = (mask & ~padding[:, None, None]) | itself
    return mask


def load_language_model(source: str | Path) -> LanguageModel:
    """Load a language model from a folder that transformers wrote, or from the hub.

    Raises:
        UserError: the model is missing, or its weights do not fit its configuration.
    """
    config = read_lm_config(source)
    with torch.device("meta"):  # its parts are replaced by those with weights
        model = LanguageModel(config)
    auto: Any = AutoModelForCausalLM if model.is_causal else AutoModel
    try:
        loaded, info = auto.from_pretrained(
            str(source), dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the weights of the language model {source} cannot be read ({reason}): copy the "
            "folder again"
        ) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        names = ", ".join(sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))[:5])
        raise UserError(f"the weights of the language model {source} do not fit it: {names}")
    model.set_base(loaded.base_model)
    if model.head is not None:
        model.head = loaded.get_output_embeddings()
    return model


@torch.no_grad()
def add_tokens(model: LanguageModel, ids: Sequence[int]) -> None:
    """Give tokens that were added to the tokenizer their rows in the tables of a model.

    The rows are the mean of all rows before the first of them, as published. The tables grow if
    they are too small and are never shrunk: those of Qwen have spare rows.

    Args:
        model: changed in place.
        ids: of the added tokens.
    """
    first, count = min(ids), max(ids) + 1
    tables = [model.embedding] + ([model.head] if model.head is not None else [])
    for table in tables:
        weight = table.weight
        if weight.shape[0] < count:
            weight = torch.cat([weight, weight.new_zeros(count - weight.shape[0], weight.shape[1])])
        weight = weight.detach().clone()
        weight[list(ids)] = weight[:first].mean(0)
        table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
    rows = model.embedding.weight.shape[0]
    model.embedding.num_embeddings = rows
    if model.head is not None:
        model.head.out_features = rows
    model.config.vocab_size = rows
