"""Tiny text-to-image training: tars of coloured squares with captions, and a configuration."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from golden_case import GOLDEN
from PIL import Image

from rae_xla.data.shards.captioned import index_captioned, index_conversations

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 210)}
TOKENIZER = str(GOLDEN / "t2i/tokenization/tokenizer")


def png(colour: tuple[int, int, int], seed: int, size: int = 56) -> bytes:
    """Return an image of a colour with some noise."""
    noise = np.random.default_rng(seed).integers(0, 40, (size, size, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar of members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def captioned_members(count: int) -> Iterable[tuple[str, bytes]]:
    """Yield images of colours in turn, each with its caption as text and in JSON."""
    for i, (name, colour) in zip(range(count), list(COLOURS.items()) * count, strict=False):
        yield f"{i:04d}.png", png(colour, i)
        yield f"{i:04d}.txt", f"a {name} square".encode()
        yield f"{i:04d}.json", json.dumps({"caption": f"{name} it is"}).encode()


def make_captioned_shards(folder: Path, count: int = 48) -> str:
    """Write two tars of images with captions, index them, and return the folder of the index."""
    members = list(captioned_members(count))
    half = 3 * (count // 2)
    write_tar(folder / "tars/a.tar", members[:half])
    write_tar(folder / "tars/b.tar", members[half:])
    index_captioned(str(folder / "tars"), str(folder / "index"))
    return str(folder / "index")


def talk(question: str, answer: str, *images: str) -> dict[str, Any]:
    """Return a conversation of one turn each; ``images`` are names of colours."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    files = [f"{name}.png" for name in images]
    return {"conversations": turns, **({"image": files} if images else {})}


TALKS = [
    talk("<image> <image> same?", "no", "red", "green"),
    talk("draw both", "<image> <image>", "blue", "red"),
    talk("hello", "hi"),
    talk("what? <image>", "green", "green"),
]
"""Two images to look at, two to generate, none, and one to look at."""


def make_talks(folder: Path, name: str, talks: list[dict[str, Any]]) -> str:
    """Write conversations and their images, index them, and return the folder of the index."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (colour, rgb) in enumerate(COLOURS.items()):
        (folder / f"{colour}.png").write_bytes(png(rgb, i))
    lines = folder / f"{name}.jsonl"
    lines.write_text("".join(json.dumps(one) + "\n" for one in talks))
    index_conversations(str(lines), str(folder / name))
    return str(folder / name)


def make_mixture(folder: Path) -> list[str]:
    """Write captions, text conversations and conversations of ``TALKS``; return the settings.

    Half of the rows generate images; the texts are in the other rows.
    """
    sources = [
        make_captioned_shards(folder / "captions", count=24),
        make_talks(folder, "texts", [talk(f"count to {i}", "one two") for i in range(12)]),
        make_talks(folder, "talks", TALKS * 4),
    ]
    return [
        f"data.train=[{','.join(sources)}]",
        "data.weights=[2,1,1]",
        "data.max_bad_samples=1",
        "text_to_image.row_pattern=[2,1]",
        "text_to_image.images_per_row=2",
        "text_to_image.answers_per_row=2",
    ]


LANGUAGE_MODEL = {
    "model_type": "qwen2",
    "vocab_size": 297,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
}


def make_config(folder: Path, shards: str, **changes: Mapping[str, Any]) -> Path:
    """Write ``t2i.yaml`` for these shards and return its path."""
    config: dict[str, Any] = {
        "stage_1": {
            "target": "stage1.RAE",
            "params": {
                "encoder_cls": "SigLIP2wNorm",
                "encoder_config_path": str(GOLDEN / "t2i/encoder/siglip2/hf"),
                "encoder_input_size": 56,
                "encoder_params": {"model_name": str(GOLDEN / "t2i/encoder/siglip2/hf")},
                "decoder_config_path": str(GOLDEN / "t2i/decoder/siglip2_decoder_grid4"),
                "decoder_patch_size": 14,
                "pretrained_decoder_path": str(
                    GOLDEN / "t2i/decoder/siglip2_decoder_grid4/model.pt"
                ),
                "noise_tau": 0.0,
            },
        },
        "text_to_image": {
            "language_model_config": LANGUAGE_MODEL,
            "tokenizer": TOKENIZER,
            "length": 96,
            "head": {"condition_dim": 24, "hidden_size": 32, "depth": 2, "num_heads": 2},
            "language_model_optimizer": {"lr": 1e-3},
        },
        "training": {
            "steps": 10,
            "global_batch_size": 8,
            "ema_decay": 0.9,
            "log_every": 1,
            "sample_every": 0,
            "optimizer": {"lr": 2e-3},
        },
        "data": {"train": shards},
        "checkpoint": {"every_steps": 5},
        "runtime": {"backend": "torch"},
    }
    for section, values in changes.items():
        config[section] = {**config[section], **values}
    path = folder / "t2i.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
