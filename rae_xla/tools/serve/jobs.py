"""Jobs of the page: requests for images, which one worker serves in turn."""

from __future__ import annotations

import io
import json
import logging
import queue
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from rae_xla.errors import UserError
from rae_xla.sample.images import Pixels

logger = logging.getLogger(__name__)

MAX_IMAGES = 16
"""Most images of a request."""
MAX_STEPS = 1000
MAX_WAITING = 16
"""Most requests that wait."""
KEPT_JOBS = 64
"""Finished requests whose images are kept in memory."""


@dataclass(frozen=True)
class Request:
    """What a visitor asks for.

    Attributes:
        text: a prompt, or the names or numbers of classes.
        guidance: guidance scale.
        steps: of the sampler.
        seed: of the noise.
        images: number of images.
    """

    text: str
    guidance: float
    steps: int
    seed: int
    images: int

    @classmethod
    def parse(cls, values: object) -> Request:
        """Return the request in a JSON value.

        Raises:
            UserError: a value is missing or out of range; the message is for the visitor.
        """
        if not isinstance(values, Mapping):
            raise UserError("the request is not a JSON object")
        text = values.get("text")
        if not isinstance(text, str):
            raise UserError("the prompt is missing")
        request = cls(
            text=text.strip(),
            guidance=_number(values, "guidance", 1, 100),
            steps=int(_number(values, "steps", 1, MAX_STEPS, whole=True)),
            seed=int(_number(values, "seed", 0, 2**63 - 1, whole=True)),
            images=int(_number(values, "images", 1, MAX_IMAGES, whole=True)),
        )
        return request

    def describe(self) -> dict[str, Any]:
        """Return the request as values for JSON."""
        return dict(vars(self))


Generate = Callable[[Request, Callable[[int, int], None]], Pixels]
"""Generates the images (N, H, W, 3) of a request, and reports (steps done, steps in total)."""


@dataclass
class Job:
    """A request and what has become of it.

    Attributes:
        request: of the visitor.
        key: that names it.
        state: ``waiting``, ``running``, ``done`` or ``failed``.
        done: solver steps.
        total: solver steps; 0 before it runs.
        error: message for the visitor, if it failed.
        images: PNGs.
    """

    request: Request
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: str = "waiting"
    done: int = 0
    total: int = 0
    error: str = ""
    images: list[bytes] = field(default_factory=list)


class Jobs:
    """A queue of requests and the thread that serves them, one at a time.

    Args:
        generate: generates images; called in the thread.
        check: raises ``UserError`` for a text that cannot be generated.
        settings: of the model, for manifests.
    """

    def __init__(
        self, generate: Generate, check: Callable[[str], None], settings: Mapping[str, Any]
    ) -> None:
        self._generate, self._check, self._settings = generate, check, settings
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._waiting: queue.Queue[Job | None] = queue.Queue(MAX_WAITING)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="serve", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Job:
        """Queue a request.

        Raises:
            UserError: it cannot be generated, or too many requests wait.
        """
        self._check(request.text)
        job = Job(request)
        with self._lock:
            self._jobs[job.key] = job
            finished = [k for k, j in self._jobs.items() if j.state in ("done", "failed")]
            for key in finished[: max(0, len(self._jobs) - KEPT_JOBS)]:
                del self._jobs[key]
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            with self._lock:
                del self._jobs[job.key]
            raise UserError(
                f"{MAX_WAITING} requests are waiting already: try again in a moment"
            ) from None
        return job

    def find(self, key: str) -> Job | None:
        """Return a job; None if there is none, or its images are kept no longer."""
        with self._lock:
            return self._jobs.get(key)

    def status(self, job: Job) -> dict[str, Any]:
        """Return what the page shows of a job."""
        with self._lock:
            ahead = [j for j in self._jobs.values() if j.state in ("waiting", "running")]
            before = ahead.index(job) if job in ahead and job.state == "waiting" else 0
        return {
            "state": job.state,
            "done": job.done,
            "total": job.total,
            "before": before,
            "error": job.error,
            "images": [f"images/{job.key}/{i}.png" for i in range(len(job.images))],
            "manifest": f"manifests/{job.key}.json",
            "settings": job.request.describe(),
        }

    def manifest(self, job: Job) -> bytes:
        """Return the manifest of the images of a job, as JSON."""
        content = {**self._settings, "request": job.request.describe(), "seed": job.request.seed}
        return (json.dumps(content, indent=1) + "\n").encode()

    def close(self) -> None:
        """End the thread after the step that it is computing."""
        self._waiting.put(None)

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            self._run(job)

    def _run(self, job: Job) -> None:
        job.state = "running"

        def report(done: int, total: int) -> None:
            job.done, job.total = done, total

        try:
            job.images = _to_pngs(self._generate(job.request, report))
            job.state = "done"
        except UserError as error:
            job.error, job.state = str(error), "failed"
        except Exception as error:  # one request must not end the server
            logger.exception("a request failed")
            job.error, job.state = f"the server failed: {type(error).__name__}", "failed"


def _to_pngs(pixels: Pixels) -> list[bytes]:
    files: Sequence[io.BytesIO] = [io.BytesIO() for _ in pixels]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file, format="png")
    return [file.getvalue() for file in files]


def _number(
    values: Mapping[str, Any], name: str, least: float, most: float, *, whole: bool = False
) -> float:
    value = values.get(name)
    kind = "whole number" if whole else "number"
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not least <= value <= most or (whole and value != int(value)):  # type: ignore[arg-type,operator]
        raise UserError(f"{name} must be a {kind} from {least:,} to {most:,}")
    return value  # type: ignore[return-value]
