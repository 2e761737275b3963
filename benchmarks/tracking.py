"""Measure what wandb costs a training whose wandb server is unreachable.

    OMP_NUM_THREADS=1 python benchmarks/tracking.py [--steps 200] [--batch 64] [--rounds 3]
    python benchmarks/tracking.py --main-thread

The same run is repeated without tracking, with a server that refuses the connection, one that
never answers, one that answers with errors, and offline. Ratios compare complete runs with the run
without tracking in the same round. ``--main-thread`` does not train: it logs 40 lines with a
tracker in 20 seconds and measures the time that the calling thread spends in it, which is more
reliable than complete runs on a busy machine.
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from world import SCALES, make_world, rae_xla


class Broken(BaseHTTPRequestHandler):
    """A server that answers with status 500."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def _answer(self) -> None:
        self.send_error(500)

    do_GET = do_POST = _answer


@contextmanager
def servers() -> Iterator[dict[str, str]]:
    """Start failing servers and yield their addresses by the kind of failure."""
    silent = socket.create_server(("127.0.0.1", 0), backlog=100)  # it never accepts
    broken = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=broken.serve_forever, daemon=True).start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refuses = free.getsockname()[1]
    ports = {
        "refuses": refuses,
        "never answers": silent.getsockname()[1],
        "status 500": broken.server_port,
    }
    yield {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    broken.shutdown()
    silent.close()


def in_the_main_thread() -> float:
    """Return the seconds that the calling thread spends in a tracker: open, 40 lines, close."""
    from rae_xla.config import load_config
    from rae_xla.train.tracking.tracker import Tracker

    config = load_config(None, overrides=["tracking.wandb=true"])
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        began, elsewhere = time.perf_counter(), 0.0
        with Tracker(Path(folder), config, start=0, total=40) as tracker:
            for step in range(1, 41):
                slept = time.perf_counter()
                time.sleep(0.5)
                elsewhere += time.perf_counter() - slept
                tracker.log(step, {"train/loss": 1 / step, "perf/step_time": 0.5})
        return time.perf_counter() - began - elsewhere


def point_at(address: str) -> None:
    """Set the address of the wandb server; an empty one selects offline mode."""
    os.environ["WANDB_API_KEY"] = "a" * 40
    os.environ["WANDB_BASE_URL"] = address or "http://127.0.0.1:9"
    os.environ["WANDB_MODE"] = "online" if address else "offline"


def main() -> None:
    """Measure every case in every round and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--main-thread", action="store_true", help="measure only the time in the tracker"
    )
    args = parser.parse_args()
    if args.main_thread:
        with servers() as addresses:
            for case, address in {**addresses, "offline": ""}.items():
                point_at(address)
                print(f"{case:<16}{in_the_main_thread():>6.2f} s of the main thread in 20 s")
        return
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, servers() as addresses:
        folder = Path(name)
        config = make_world(folder, SCALES["digits"], images=512)
        cases = {"no tracking": "", **addresses, "offline": ""}
        for number in range(args.rounds):
            for case, address in cases.items():
                point_at(address)
                began = time.perf_counter()
                rae_xla(
                    "train", "stage2", "--config", config,
                    "--results-dir", folder / f"{case.replace(' ', '-')}-{number}",
                    "runtime.backend=torch", f"training.steps={args.steps}",
                    "training.log_every=10", f"training.global_batch_size={args.batch}",
                    f"checkpoint.every_steps={args.steps}",
                    f"tracking.wandb={str(case != 'no tracking').lower()}",
                )  # fmt: skip
                seconds.setdefault(case, []).append(time.perf_counter() - began)
                print(f"{case}: {seconds[case][-1]:.1f} s", file=sys.stderr, flush=True)
    print(f"{'server':<16}{'seconds':>9}{'ratio':>8}   of {args.steps} steps, {args.rounds} rounds")
    for case, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds["no tracking"], strict=True))
        print(f"{case:<16}{statistics.median(own):>9.1f}{ratio:>8.3f}")


if __name__ == "__main__":
    main()
