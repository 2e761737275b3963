"""The command line in processes that need not import everything again.

A command of a second spends four on imports. This server imports once and forks for each command:
every one is a process of its own, as a user's is, with its own streams, environment and exit code.

It reads a line of JSON from its standard input, a list of commands that are to run at once, and
answers with one: their exit codes, null for one that took too long or was ended because another had
failed (as torchrun does).
"""

import importlib
import json
import os
import pkgutil
import signal
import sys
import time
import traceback


def serve() -> None:
    """Answer until standard input ends."""
    import_everything()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


def import_everything() -> None:
    """What commands import on their way, but nothing that starts a thread or touches a device."""
    import rae_xla

    for module in pkgutil.walk_packages(rae_xla.__path__, "rae_xla."):
        if not module.name.startswith(("rae_xla.__main__", "rae_xla.runtime.xla")):
            importlib.import_module(module.name)


def run(commands: list[dict]) -> list[int | None]:
    """Run commands, each in a fork of this process."""
    running: dict[int, int] = {}
    for number, command in enumerate(commands):
        pid = os.fork()
        if pid == 0:
            sys.exit(execute(command))
        os.setpgid(pid, pid)  # there before it is to be killed; the fork does it too
        running[pid] = number
    codes: list[int | None] = [None] * len(commands)
    until = time.monotonic() + max(command["timeout"] for command in commands)
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        if any(codes) or time.monotonic() > until:
            for pid in running:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return codes
        time.sleep(0.005)
    return codes


def execute(command: dict) -> int:
    """In the fork: become what ``python -m rae_xla ARGUMENTS`` would be."""
    os.setpgid(0, 0)
    for number, path in ((1, command["stdout"]), (2, command["stderr"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(command["environment"])
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
        sys.stdout.flush()
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
