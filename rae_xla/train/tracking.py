"""Where a run's figures go: ``metrics.jsonl`` always, the console, and wandb when asked for."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rae_xla.sample.pictures import Pixels, save_png

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


class Tracker:
    """Writes figures and pictures of one run. Of several processes, one speaks."""

    def __init__(
        self, folder: Path, config: RunConfig, *, start: int, total: int, speaks: bool = True
    ) -> None:
        """Open the run's files; on a resume, drop the lines of steps that will run again."""
        self._folder, self._speaks = folder, speaks
        path = folder / "metrics.jsonl" if speaks else Path(os.devnull)
        if speaks:
            _drop_lines_after(path, start)
        self._file = path.open("a", encoding="utf-8")
        hidden = not (speaks and sys.stderr.isatty())
        self._bar = tqdm(
            total=total, initial=start, unit="step", dynamic_ncols=True, disable=hidden
        )
        wanted = speaks and config.tracking.wandb
        self._wandb = _start_wandb(folder, config) if wanted else None

    def advance(self) -> None:
        """One step more on the progress bar."""
        self._bar.update()

    def say(self, line: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._speaks:
            tqdm.write(line, file=sys.stderr)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record figures under their names (``train/loss``, ``perf/step_time`` ...)."""
        line = {"step": step, **figures}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.say(_console_line(step, figures))
        self._to_wandb(dict(figures), step)

    def images(self, step: int, name: str, grid: Pixels) -> None:
        """Save an (H, W, 3) uint8 picture as ``samples/<name>-<step>.png``."""
        if not self._speaks:
            return
        path = self._folder / "samples" / f"{name}-{step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            save_png(path, grid)
        except OSError as error:  # a picture is not worth a run
            self.say(f"step {step}: {path} could not be written: {error}")
            return
        if self._wandb is not None:
            import wandb

            self._to_wandb({f"samples/{name}": wandb.Image(str(path))}, step)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _to_wandb(self, content: dict[str, Any], step: int) -> None:
        """Hand over to wandb; its troubles are told once and never stop the training."""
        if self._wandb is None:
            return
        try:
            self._wandb.log(content, step=step)
        except Exception as error:
            self.say(f"wandb: {error}; going on without it (metrics.jsonl has everything)")
            self._wandb = None


_PLAIN_ON_CONSOLE = ("train/", "opt/", "perf/")
_SILENT_AT_ZERO = ("skipped", "fallbacks", "compilations", "bad_samples", "paused")
_NOT_ON_CONSOLE = ("images_per_second_per_chip", "host_memory_gb")


def _console_line(step: int, figures: Mapping[str, float]) -> str:
    shown = {}
    for name, value in figures.items():
        room, _, rest = name.rpartition("/")
        if rest not in _NOT_ON_CONSOLE and (value or rest not in _SILENT_AT_ZERO):
            shown[rest if room + "/" in _PLAIN_ON_CONSOLE else name] = value
    return f"step {step:>7d}  " + "  ".join(f"{k} {v:.4g}" for k, v in shown.items())


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to ``step``; a line cut short by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    unfinished.replace(path)


def _start_wandb(folder: Path, config: RunConfig) -> Any:
    """A wandb run tied to the results folder, so that a resumed run continues the same curves."""
    try:
        import wandb

        if key := os.environ.get("WANDB_KEY"):
            os.environ.setdefault("WANDB_API_KEY", key)
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        return wandb.init(
            project=config.tracking.project or os.environ.get("PROJECT") or "rae_xla",
            entity=config.tracking.entity or os.environ.get("ENTITY"),
            name=config.tracking.name or folder.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=config.to_dict(),
        )
    except Exception as error:
        print(
            f"wandb: {error}; going on without it (metrics.jsonl has everything)", file=sys.stderr
        )
        return None
