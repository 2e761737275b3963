"""Starts the command line again and again without importing torch again and again.

Reads a JSON list of arguments per line, runs ``rae-xla`` with them in a forked process, says that
process's number, and when it has ended its exit status.
"""

import importlib
import json
import os
import sys

import torch

from rae_xla.cli import main as cli

for module in ("train.loop", "models.rae", "models.dit_dh", "data.gcs"):
    importlib.import_module(f"rae_xla.{module}")


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            log = os.open(os.environ["LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os._exit(cli.main(json.loads(line)))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
