"""CLIPScore of images and prompts by torchmetrics, with the weights of a local folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.hf_folder import WEIGHT_FILES, read_json
from rae_xla.models.pretrained.fingerprint import fingerprint
from rae_xla.models.pretrained.hub import local_folder
from rae_xla.sample.images import Pixels

CLIP = "openai/clip-vit-large-patch14"
"""The default of torchmetrics."""

CLIP_FILES = (
    "config.json, model.safetensors, preprocessor_config.json, and tokenizer.json (or vocab.json "
    "and merges.txt)"
)
"""The files of a CLIP in a folder."""

_PATTERNS = ["*.json", "*.txt", "*.safetensors"]
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def clip_folder(source: str | None) -> Path:
    """Return the local folder of a CLIP, after downloading it if it is on the hub.

    Args:
        source: folder or hub id of a CLIP of transformers with its processor; None: ``CLIP``.

    Raises:
        UserError: it cannot be found.
    """
    try:
        return local_folder(source or CLIP, _PATTERNS)
    except UserError as error:
        raise missing_clip(str(error)) from error


def missing_clip(problem: str, folder: str = "FOLDER") -> UserError:
    """Return the error of a CLIP that is not there: which files are needed, and where they go.

    Args:
        problem: what was found instead.
        folder: that is to contain the files.
    """
    return UserError(
        f"CLIPScore needs a CLIP: {problem}; copy the files {CLIP_FILES} of a CLIP, such as "
        f"{CLIP}, to a folder and give it: --clip {folder} (with a network: `rae-xla hub pull "
        f"{CLIP} --to {folder} --files '*.json' '*.txt' model.safetensors`)"
    )


def check_clip(folder: Path) -> None:
    """Raise unless a folder has the files of a CLIP; nothing is loaded.

    Raises:
        UserError: a file is missing, or of another model.
    """
    if not folder.is_dir():
        raise missing_clip(f"there is no folder {folder}", str(folder))
    present = {path.name for path in folder.iterdir()}
    wanted = {
        "config.json": "config.json" in present,
        "model.safetensors": bool(present & set(WEIGHT_FILES)),
        "preprocessor_config.json": bool(present & set(_PROCESSORS)),
        "tokenizer.json": "tokenizer.json" in present or {"vocab.json", "merges.txt"} <= present,
    }
    if absent := [name for name, found in wanted.items() if not found]:
        raise missing_clip(f"{folder} has no {', '.join(absent)}", str(folder))
    kind = (read_json(str(folder), "config.json") or {}).get("model_type")
    if kind != "clip":
        raise missing_clip(f"config.json in {folder} is of a model of type {kind}", str(folder))


class ClipScorer:
    """Scores how well images show their prompts: 100 cos(image, prompt), at least 0.

    A prompt that is longer than CLIP's text encoder reads is cut, and keeps its end token.

    Args:
        folder: of a CLIP in the format of transformers, with its processor.
        device: where it runs.

    Attributes:
        folder: see above.
        text_length: tokens of a prompt that it reads, with start and end.

    Raises:
        UserError: files are missing, cannot be read, or belong to another model.
    """

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.folder, self._device = Path(folder), device
        check_clip(self.folder)
        load: Any = CLIPModel.from_pretrained  # its type knows no output_loading_info
        try:
            model, found = load(
                self.folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
            processor = CLIPProcessor.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # safetensors and tokenizers raise their own exceptions
            raise _unreadable(self.folder, str(error).strip().split("\n")[0]) from error
        if absent := sorted(found["missing_keys"]):
            # transformers would leave these weights random.
            raise _unreadable(self.folder, f"the weights lack {absent[0]}")
        self._model = _TensorFeatures(model.to(device).eval())
        self.text_length: int = model.config.text_config.max_position_embeddings
        self._processor = _FixedLength(processor, self.text_length)

    @property
    def parts(self) -> Callable[[], tuple[Any, Any]]:
        """Model and processor, as the metrics of torchmetrics take them."""
        return lambda: (self._model, self._processor)

    def sha256(self) -> str:
        """Return the fingerprint of the weights."""
        return fingerprint(self._model.model.state_dict())

    def is_cut(self, prompt: str) -> bool:
        """Return whether a prompt is longer than the text encoder reads."""
        return self._processor.is_cut(prompt)

    @torch.no_grad()
    def similarities(self, pixels: Pixels, prompts: Sequence[str]) -> list[float]:
        """Return 100 cos(image, prompt) of each image (N, H, W, 3), which may be negative.

        They are computed one by one, so that none depends on the other images.
        """
        from torchmetrics.multimodal import CLIPScore

        metric = CLIPScore(self.parts).to(self._device)
        found = []
        for image, prompt in zip(self.images(pixels), prompts, strict=True):
            metric.reset()
            metric.update(image, prompt)
            found.append(float(metric.score))
        return found

    def scores(self, pixels: Pixels, prompts: Sequence[str]) -> list[float]:
        """Return the CLIPScore of each image (N, H, W, 3): 100 cos(image, prompt), at least 0."""
        return [max(found, 0.0) for found in self.similarities(pixels, prompts)]

    def images(self, pixels: Pixels) -> list[Tensor]:
        """Return images (N, H, W, 3) as torchmetrics takes them, on the device."""
        whole = torch.tensor(np.ascontiguousarray(pixels))
        return list(whole.permute(0, 3, 1, 2).to(self._device))


class _TensorFeatures(nn.Module):
    """A CLIP whose features are tensors; transformers 5 returns the whole output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return _pooled(found)


class _FixedLength:
    """A processor that pads and cuts texts to one length, with the end token.

    torchmetrics cuts the end token off a long text, at which CLIP's text encoder is read out. One
    length also compiles once on XLA.
    """

    def __init__(self, processor: Any, length: int) -> None:
        self._processor, self._length = processor, length

    def __call__(self, *, text: Any = None, images: Any = None, **_: Any) -> Any:
        if images is not None:
            return self._processor(images=images, return_tensors="pt")
        return self._processor(
            text=text,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self._length,
        )

    def is_cut(self, text: str) -> bool:
        return len(self._processor(text=text)["input_ids"]) > self._length


def _pooled(output: Any) -> Tensor:
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def _unreadable(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the CLIP in {folder} cannot be read ({reason}): give a folder with the model and the "
        "processor of CLIP, as transformers' save_pretrained writes them"
    )
