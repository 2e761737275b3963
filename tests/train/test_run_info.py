"""Run information: version of the code, one line per start."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from rae_xla.train.run_info import ENVIRONMENT_FILE, append_run_info, git_version

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no checkout")
def test_the_commit_is_the_one_git_knows():
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    commit, _, rest = git_version().partition("-")
    assert len(commit) >= 16
    assert head.startswith(commit)
    assert rest in ("", "dirty")


def test_each_start_is_a_line(tmp_path):
    for steps in (10, 20):
        append_run_info(tmp_path, {"plan": {"steps": steps}})
    lines = [json.loads(x) for x in (tmp_path / ENVIRONMENT_FILE).read_text().splitlines()]
    assert [line["plan"]["steps"] for line in lines] == [10, 20]
    assert lines[0]["started_at"] <= lines[1]["started_at"]
