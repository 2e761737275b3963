"""A tiny CLIP with random weights, in the folder format of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEXT_LENGTH = 16


def write_tiny_clip(folder: Path, *, seed: int = 1) -> Path:
    """Write model, image processor and tokenizer to a folder and return it.

    Its scores differ between prompts and between images, and some are negative.
    """
    characters = list(bytes_to_unicode().values())
    pieces = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=TEXT_LENGTH
    )
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={
            **sizes,
            "vocab_size": len(pieces),
            "max_position_embeddings": TEXT_LENGTH,
            "bos_token_id": len(pieces) - 2,
            "eos_token_id": len(pieces) - 1,
            "pad_token_id": len(pieces) - 1,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder
