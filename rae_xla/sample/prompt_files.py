"""Files of a set of images from prompts, in the folder layouts that benchmarks read.

``geneval``: ``00000/metadata.jsonl`` and ``00000/samples/0000.png``, which GenEval's
``evaluate_images.py`` reads. ``dpg``: ``grids/ID.png``, a 2 x 2 grid for each prompt, which
DPG-Bench's ``compute_dpg_bench.py`` reads, made of ``samples/ID/0000.png``. ``flat``:
``000000.png``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from rae_xla import storage
from rae_xla.config.paths import StoragePath
from rae_xla.data.image_decoding import ImageError, decode_rgb
from rae_xla.errors import UserError
from rae_xla.sample.images import save_png, to_grid
from rae_xla.sample.prompts import Prompt

LAYOUTS = ("flat", "geneval", "dpg")
PROMPTS_FILE = "prompts.jsonl"
"""Which prompt each image shows: a line of JSON for each, with ``file`` and ``prompt``."""

_DPG_GRID = 4  # images of a grid


class PromptFiles:
    """The image files of a set of prompts.

    Args:
        out: the set's folder, local or ``gs://``.
        layout: one of ``LAYOUTS``.
        prompts: of the set.
        per_prompt: images of each prompt; image i is number ``i % per_prompt`` of prompt
            ``i // per_prompt``.

    Raises:
        UserError: the layout cannot have so many images of a prompt.
    """

    def __init__(
        self, out: StoragePath, layout: str, prompts: Sequence[Prompt], per_prompt: int
    ) -> None:
        if layout == "dpg" and per_prompt > _DPG_GRID:
            raise UserError(
                f"--layout dpg has at most {_DPG_GRID} images of a prompt, not {per_prompt}"
            )
        self._out, self._layout = out, layout
        self._prompts, self._per_prompt = prompts, per_prompt
        self.count = len(prompts) * per_prompt

    def path(self, i: int) -> StoragePath:
        """Return the path that image i is written to."""
        return self._out / self._name(i)

    def existing(self) -> set[int]:
        """Return the indices of the images that exist; each of them is complete."""
        found: set[int] = set()
        folders = {}
        for i in range(self.count):
            folder, _, name = self._name(i).rpartition("/")
            if folder not in folders:
                where = self._out / folder if folder else self._out
                folders[folder] = storage.list_files(where) if storage.exists(where) else {}
            if name in folders[folder]:
                found.add(i)
        return found

    def prepare(self) -> None:
        """Create every folder, and write which prompt each image shows."""
        for i in range(0, self.count, self._per_prompt):
            storage.make_folder(self.path(i).parent)
        lines = [
            {
                "file": self._name(i),
                "prompt": self._prompts[i // self._per_prompt].text,
                "number": i % self._per_prompt,
                "id": self._prompts[i // self._per_prompt].name,
            }
            for i in range(self.count)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        storage.write_bytes(self._out / PROMPTS_FILE, text.encode())
        if self._layout == "geneval":
            for number, prompt in enumerate(self._prompts):
                line = prompt.line or json.dumps({"prompt": prompt.text})
                path = self._out / f"{number:05d}" / "metadata.jsonl"
                storage.write_bytes(path, f"{line}\n".encode())
        if self._layout == "dpg":
            storage.make_folder(self._out / "grids")

    def finish(self) -> None:
        """Write what is made of all images; to be called when they exist.

        Raises:
            UserError: an image is damaged.
        """
        if self._layout != "dpg":
            return
        done = storage.list_files(self._out / "grids")
        for number, prompt in enumerate(self._prompts):
            if (name := f"{prompt.name}.png") not in done:
                first = number * self._per_prompt
                images = [self._pixels(i) for i in range(first, first + self._per_prompt)]
                columns = 1 if len(images) == 1 else 2
                save_png(self._out / "grids" / name, to_grid(np.stack(images), columns, gap=0))

    def _name(self, i: int) -> str:
        """Return the path of image i in the folder."""
        prompt, number = divmod(i, self._per_prompt)
        if self._layout == "flat":
            return f"{i:06d}.png"
        if self._layout == "geneval":
            return f"{prompt:05d}/samples/{number:04d}.png"
        return f"samples/{self._prompts[prompt].name}/{number:04d}.png"

    def _pixels(self, i: int) -> np.ndarray:
        try:
            return np.asarray(decode_rgb(storage.read_bytes(self.path(i))))
        except (ImageError, OSError) as error:
            raise UserError(
                f"{self.path(i)}: not a readable image ({error}): remove the file and repeat the "
                "command, which generates it again"
            ) from error
