"""Text-to-image configurations whose language model can be built without its weights."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from rae_xla.config.text_to_image import TextToImageConfig
from rae_xla.data.conversations import IMAGE_END, IMAGE_START, TURN_END, TURN_START
from rae_xla.errors import UserError

# The keys of the published config.json files that determine shapes (Qwen2.5, 2412.15115; Qwen3,
# 2505.09388; SmolLM2, 2502.02737).
_QWEN2 = {"model_type": "qwen2", "vocab_size": 151936}
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128}
_SMOLLM2 = {"model_type": "llama", "vocab_size": 49152}
_PUBLISHED: list[tuple[str, dict[str, Any], tuple[int, int, int, int, int], bool]] = [
    # pattern, further keys, (hidden, intermediate, layers, heads, key and value heads), tied
    (r"qwen2\.5-0\.5b", _QWEN2, (896, 4864, 24, 14, 2), True),
    (r"qwen2\.5-1\.5b", _QWEN2, (1536, 8960, 28, 12, 2), True),
    (r"qwen2\.5-3b", _QWEN2, (2048, 11008, 36, 16, 2), True),
    (r"qwen2\.5-7b", _QWEN2 | {"vocab_size": 152064}, (3584, 18944, 28, 28, 4), False),
    (r"qwen3-0\.6b", _QWEN3, (1024, 3072, 28, 16, 8), True),
    (r"qwen3-1\.7b", _QWEN3, (2048, 6144, 28, 16, 8), True),
    (r"smollm2-135m", _SMOLLM2, (576, 1536, 30, 9, 3), True),
    (r"smollm2-360m", _SMOLLM2, (960, 2560, 32, 15, 5), True),
    (r"smollm2-1\.7b", _SMOLLM2, (2048, 8192, 24, 32, 32), True),
]


def published_language_model(name: str) -> dict[str, Any] | None:
    """Return the config.json of a published language model, or None if it is unknown.

    Args:
        name: hub id or folder of the model.
    """
    for pattern, values, sizes, tied in _PUBLISHED:
        if re.search(pattern, Path(name).name, re.IGNORECASE):
            hidden, intermediate, layers, heads, key_value_heads = sizes
            return values | {
                "hidden_size": hidden,
                "intermediate_size": intermediate,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": key_value_heads,
                "tie_word_embeddings": tied,
            }
    return None


def text_to_image_without_weights(
    section: TextToImageConfig, folder: Path
) -> tuple[TextToImageConfig, list[str]]:
    """Return a section whose networks can be built without weight files.

    Args:
        section: of the run.
        folder: receives a tokenizer with only the special tokens if the run's own is missing. Its
            vocabulary does not enlarge the table of embeddings; published tables have spare rows.

    Returns:
        The section, and the assumptions made, as sentences.

    Raises:
        UserError: the sizes of the language model are not known.
    """
    notes: list[str] = []
    values = section.language_model_config
    if values is None:
        if section.language_model is None:
            raise UserError(
                "the sizes of a model that starts from text_to_image.ckpt are not known: set "
                "text_to_image.language_model to its language model (a folder with config.json, or "
                "the name of a published one), and text_to_image.head to the sizes of its head"
            )
        values = _config_of(section.language_model, notes)
    tokenizer = section.tokenizer or section.ckpt or section.language_model
    if tokenizer is None or not (Path(tokenizer) / "tokenizer.json").is_file():
        tokenizer = str(_write_tokenizer(folder))
    return replace(
        section,
        ckpt=None,
        language_model=None,
        language_model_config=values,
        tokenizer=tokenizer,
    ), notes


def _config_of(name: str, notes: list[str]) -> dict[str, Any]:
    file = Path(name) / "config.json"
    if file.is_file():
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content
    values = published_language_model(name)
    if values is None:
        raise UserError(
            f"the language model {name} has no local config.json and is not a known published one: "
            "download the model's folder (its config.json suffices) and set "
            "text_to_image.language_model to it"
        )
    notes.append(
        f"language model {name} has its published sizes (its config.json is not available locally)"
    )
    return values


def _write_tokenizer(folder: Path) -> Path:
    folder = folder / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    words = ["\n", TURN_START, TURN_END, IMAGE_START, IMAGE_END]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    Tokenizer(model).save(str(folder / "tokenizer.json"))
    return folder
