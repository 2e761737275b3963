"""The processes of a pod on this machine, which find each other and exchange text for real.

``python fake_pod.py FILE`` imports torch once and forks a process for each entry of the JSON list
in FILE, which has these keys:

- ``index`` and ``count``: place of the process.
- ``texts``: exchanged one after the other; ``exit`` ends the process, ``kill`` kills it.
- ``timeout``: seconds, of the group.
- ``environment``: variables of this process.
- ``delay``: seconds before it starts.
- ``metadata``: address of a metadata server; the process then discovers process 0 like the XLA
  backend of a TPU host does, and checks its slices.
- ``slices``: number of slices that its devices belong to.
- ``devices``: numbers of its devices, which are exchanged first.

It prints a JSON list of [exit status, result]: what the process received, or the kind, exit status
and message of its error.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rae_xla.errors import UserError


def run_pod(processes: Sequence[dict[str, Any]], timeout: float = 120) -> list[tuple[int, Any]]:
    """Run the processes of a pod on a free port; return exit status and result of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_PORT": str(port - 1)}
    if not any("metadata" in process for process in processes):
        variables["MASTER_ADDR"] = "localhost"
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(processes, file)
        file.flush()
        done = subprocess.run(
            [sys.executable, __file__, file.name],
            env=os.environ | variables, capture_output=True, text=True, timeout=timeout,
            check=True,
        )  # fmt: skip
    return [tuple(result) for result in json.loads(done.stdout.splitlines()[-1])]


@contextmanager
def metadata_server(entries: Sequence[str]) -> Iterator[list[str]]:
    """Serve a ``tpu-env`` entry for each host; yield the addresses of their servers."""
    hosts = {f"/{number}/instance/attributes/tpu-env": text for number, text in enumerate(entries)}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.headers["Metadata-Flavor"] == "Google" and hosts.get(self.path)
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield [f"{address}/{number}" for number in range(len(entries))]
    server.shutdown()
    thread.join()


def _run(process: dict[str, Any]) -> Any:
    from rae_xla.runtime import process_group

    os.environ.update(process.get("environment", {}))
    time.sleep(process.get("delay", 0))
    index, count = process["index"], process["count"]
    address = _discover(process) if "metadata" in process else "localhost"
    process_group.join_hosts(
        index, count, address, timeout=timedelta(seconds=process.get("timeout", 30))
    )
    texts = list(process.get("texts", ()))
    if "devices" in process:
        texts.insert(0, json.dumps(process["devices"]))
    received = []
    for text in texts:
        if text == "exit":
            break
        if text == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        received.append(process_group.all_gather_text(text))
    return received


def _discover(process: dict[str, Any]) -> str:
    """Return the address of process 0, after the checks of the XLA backend."""
    from torch_xla._internal import tpu

    from rae_xla.runtime.mesh import MeshShape
    from rae_xla.runtime.xla import compat
    from rae_xla.runtime.xla.pod import Megascale, check_slices

    tpu._GCE_METADATA_ROOT_URL = process["metadata"]
    megascale = Megascale(compat.tpu_metadata)
    slices = process["slices"]
    check_slices(MeshShape(data=1, fsdp=1, slices=slices), slices, megascale.num_slices)
    return megascale.coordinator or compat.tpu_process_0_address()


def _in_child(process: dict[str, Any], result: Path) -> None:
    try:
        text = json.dumps(_run(process))
    except UserError as error:
        text = json.dumps([type(error).__name__, error.exit_status, str(error)])
    result.write_text(text)
    os._exit(0)


def main(file: str) -> None:
    """Fork the processes, wait for them and print their results."""
    processes = json.loads(Path(file).read_text())
    import torch.distributed

    import rae_xla.runtime.process_group

    if any("metadata" in process for process in processes):
        import torch_xla  # noqa: F401

        import rae_xla.runtime.xla.compat  # noqa: F401
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for number, process in enumerate(processes):
            if (pid := os.fork()) == 0:
                _in_child(process, Path(folder) / str(number))
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        paths = [Path(folder) / str(number) for number in range(len(processes))]
        results = [json.loads(path.read_text()) if path.exists() else None for path in paths]
    print(json.dumps(list(zip(codes, results, strict=True))))


if __name__ == "__main__":
    main(sys.argv[1])
