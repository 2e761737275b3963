"""Run command lines in forks of one process that has already imported everything.

A command that takes a second spends four more on imports. This server imports once and forks for
each command. Every fork behaves like a process that a user started: it has its own streams,
environment, working directory and exit code.

The server reads one JSON request per line from standard input and answers with one line:

- ``{"start": [COMMAND, ...]}``: start commands; the answer is the list of their process ids.
- ``{"wait": [PID, ...], "timeout": SECONDS}``: wait for commands; the answer is the list of their
  exit codes. If one fails or the time is up, the others are killed (as torchrun does); their code
  is null.

Run ``python cli_server.py xla`` to import torch_xla in advance, too.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
import threading
import time
import traceback
from typing import NoReturn


def serve(with_torch_xla: bool) -> None:
    """Answer requests until standard input ends."""
    before = dict(os.environ)
    import_package()
    if with_torch_xla:
        importlib.import_module("rae_xla.runtime.xla.backend")
    added = added_variables(before)
    # Forks leave these objects alone, so that the pages that hold them stay shared.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = [start(command, added) for command in request["start"]]
        else:
            answer = wait(request["wait"], request["timeout"])
        print(json.dumps(answer), flush=True)


def import_package() -> None:
    """Import all modules of the package that neither start threads nor touch a device."""
    import rae_xla

    for module in pkgutil.walk_packages(rae_xla.__path__, "rae_xla."):
        if not module.name.startswith(("rae_xla.__main__", "rae_xla.runtime.xla.")):
            importlib.import_module(module.name)


def added_variables(before: dict[str, str]) -> dict[str, str]:
    """Return what imports have added to environment variables (torch_xla extends XLA_FLAGS)."""
    return {
        name: value.removeprefix(before.get(name, ""))
        for name, value in os.environ.items()
        if value != before.get(name) and value.startswith(before.get(name, ""))
    }


def start(command: dict, added: dict[str, str]) -> int:
    """Fork a process that executes a command and return its id."""
    pid = os.fork()
    if pid == 0:
        execute(command, added)
    os.setpgid(pid, pid)  # the fork does it too: whoever comes first
    return pid


def wait(pids: list[int], timeout: float) -> list[int | None]:
    """Wait for processes and return their exit codes; kill the rest if one fails or time is up."""
    codes: dict[int, int | None] = dict.fromkeys(pids)
    running = set(pids)
    until = time.monotonic() + timeout
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                running.remove(pid)
        if any(codes.values()) or time.monotonic() > until:
            for pid in running:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            break
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def execute(command: dict, added: dict[str, str]) -> NoReturn:
    """Do in a fork what ``python -m rae_xla ARGUMENTS`` would do."""
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, command["stdout"]), (2, command["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(command["environment"])
    for name, value in added.items():
        os.environ[name] = os.environ.get(name, "") + value
    os.chdir(command["folder"])
    sys.argv = ["rae-xla", *command["arguments"]]
    code = 1
    try:
        from rae_xla.cli.main import main

        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # The rest of the interpreter's shutdown frees memory, which copies every shared page.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(with_torch_xla="xla" in sys.argv[1:])
