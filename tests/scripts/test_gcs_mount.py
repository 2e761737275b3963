"""Tests of setup_gcs_mount.sh, with stub programs instead of gcsfuse, apt-get, sudo and others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "setup_gcs_mount.sh"

# Every stub records its arguments, one call per line. $STATE contains the table of mounts (place,
# type, source) and the failures that a test requests.
NOTE = """#!/usr/bin/env bash
( printf '%s' "${0##*/}"; printf '|%s' "$@"; echo ) >> "$STATE/calls"
"""

GCSFUSE = """
if [[ -s $STATE/troubles ]]; then
    head -n 1 "$STATE/troubles"
    sed -i 1d "$STATE/troubles"
    exit 1
fi
printf '%s\\t%s\\t%s\\n' "${!#}" fuse.gcsfuse "${@: -2:1}" >> "$STATE/mounts"
"""

FINDMNT = """
while IFS=$'\\t' read -r place type source; do
    [[ $place != "${!#}" ]] || found="$type $source 0:77"
done < "$STATE/mounts"
[[ -n ${found:-} ]] && echo "$found"
"""

MOUNTPOINT = """
[[ ! -e $STATE/dead ]] && cut -f 1 "$STATE/mounts" | grep -qxF -- "$2"
"""

FUSERMOUNT = """
[[ ! -e $STATE/busy || $2 == -z ]] || { echo "Device or resource busy" >&2; exit 1; }
grep -vF -- "${!#}"$'\\t' "$STATE/mounts" > "$STATE/rest"
cat "$STATE/rest" > "$STATE/mounts"
"""

# A mounted bucket contains files unless a test changes that.
LS = """
if cut -f 1 "$STATE/mounts" | grep -qxF -- "${!#}"; then
    [[ ! -s $STATE/unreadable ]] || {
        sed -i 1d "$STATE/unreadable"; echo "Input/output error" >&2; exit 2; }
    cat "$STATE/files"
else
    exec "$REAL_LS" "$@"
fi
"""

# As root it executes the command, except commands that would change the machine.
SUDO = """
[[ $1 != -n ]] || shift
case $1 in install) exec "$@" ;; env | apt-get) "$@" ;; esac
"""

APT_GET = """
[[ $* != *" gcsfuse" || -e $STATE/no-package ]] || cp "$STATE/gcsfuse" "${0%/*}/gcsfuse"
[[ $* != *" gcsfuse" || ! -e $STATE/no-package ]]
"""


class Machine:
    """A PATH of stubs and a folder for mount points; `user` is the id of who runs the script."""

    def __init__(self, folder: Path) -> None:
        self.home, self.bin, self.state = folder / "home", folder / "bin", folder / "state"
        for path in (self.home, self.bin, self.state):
            path.mkdir()
        (self.state / "mounts").touch()
        (self.state / "files").write_text("index.json\n")
        tools = "bash cat cp cut dirname env grep head numfmt realpath sed tail touch wc"
        for tool in tools.split():
            (self.bin / tool).symlink_to(self.real(tool))
        for tool in ("mkdir", "install"):  # what changes something is noted
            self.stub(tool, f'exec {self.real(tool)} "$@"')
        for tool in ("curl", "chmod", "rm", "sleep", "sh"):
            self.stub(tool)
        self.stub("apt-cache", "[[ -e $STATE/offered ]]")
        self.stub("apt-get", APT_GET)
        self.stub("findmnt", FINDMNT)
        self.stub("fusermount", FUSERMOUNT)
        self.stub("gcsfuse", GCSFUSE)
        self.stub("id", 'echo "${USER_ID:-1000}"')
        self.stub("ls", LS)
        self.stub("mountpoint", MOUNTPOINT)
        self.stub("pgrep", 'cat "$STATE/processes" 2>/dev/null')
        self.stub("sudo", SUDO)
        self.stub("timeout", 'shift; exec "$@"')

    @staticmethod
    def real(tool: str) -> str:
        where = shutil.which(tool)
        assert where, f"this test needs {tool}"
        return where

    def stub(self, name: str, text: str = "") -> None:
        (self.bin / name).write_text(NOTE + text)
        (self.bin / name).chmod(0o755)

    def trouble(self, *messages: str) -> None:
        """Set the messages of the next failures of gcsfuse, one for each failure."""
        (self.state / "troubles").write_text("".join(f"{m}\n" for m in messages))

    def without_gcsfuse(self) -> None:
        (self.bin / "gcsfuse").rename(self.state / "gcsfuse")

    def mounted(self, place: str, source: str, fstype: str = "fuse.gcsfuse") -> None:
        (self.home / place).mkdir(exist_ok=True)
        (self.state / "mounts").write_text(f"{self.home / place}\t{fstype}\t{source}\n")

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The script, in `home`; `.calls` are the stubs that were called, as lists of words."""
        (self.state / "calls").write_text("")
        result = subprocess.run(
            ["bash", SCRIPT, *words],
            cwd=self.home,
            env={
                "PATH": str(self.bin),
                "STATE": str(self.state),
                "TMPDIR": str(self.state),
                "REAL_LS": self.real("ls"),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.calls = [c.split("|") for c in (self.state / "calls").read_text().splitlines()]
        assert not {"rm", "chmod"} & {call[0] for call in self.calls}, "it deletes nothing"
        return result

    def called(self, *begin: str) -> list[list[str]]:
        return [call for call in self.calls if call[: len(begin)] == list(begin)]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """The one error of a run that failed."""
    assert result.returncode == 2, result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("gcs mount: error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


# ----------------------------------------------------------------------------- mounting


def test_mount_options(machine):
    result = machine.run("bucket-1", "shards")
    assert result.returncode == 0, result.stderr
    ((_, *words),) = machine.called("gcsfuse")
    assert words == [
        "-o",
        "ro",
        "--implicit-dirs",
        "--metadata-cache-ttl-secs=-1",
        "--metadata-cache-negative-ttl-secs=0",
        "--stat-cache-max-size-mb=-1",
        "--kernel-list-cache-ttl-secs=60",
        "--sequential-read-size-mb=256",
        "--max-conns-per-host=0",
        f"--log-file={machine.state}/gcsfuse{str(machine.home / 'shards').replace('/', '-')}.log",
        "--log-format=text",
        "bucket-1",
        str(machine.home / "shards"),
    ]
    assert f"mounted: gs://bucket-1 on {machine.home}/shards, read-only" in result.stdout
    assert machine.called("mkdir", "-p", str(machine.home / "shards"))
    # All commands that run as root, without a password prompt.
    set_read_ahead = "echo 1024 >/sys/class/bdi/0:77/read_ahead_kb"
    assert machine.called("sudo") == [["sudo", "-n", "sh", "-c", set_read_ahead]]


def test_root_needs_no_sudo(machine):
    machine.run("bucket-1", "shards", USER_ID="0")
    assert machine.called("sh", "-c")
    assert not machine.called("sudo")


def test_failure_to_set_read_ahead_is_ignored(machine):
    machine.stub("sudo", "echo 'a password is required' >&2; exit 1")
    result = machine.run("bucket-1", "shards")
    assert result.returncode == 0
    assert "note: the kernel's read-ahead was not changed" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("bucket", "words"),
    [
        ("gs://bucket-1", ["bucket-1"]),
        ("gs://bucket-1/", ["bucket-1"]),
        ("gs://bucket-1/a/b/", ["--only-dir=a/b", "bucket-1"]),
        ("bucket_1.example.org/my shards", ["--only-dir=my shards", "bucket_1.example.org"]),
    ],
)
def test_bucket_and_folder_names(machine, bucket, words):
    assert machine.run(bucket, "shards").returncode == 0
    (call,) = machine.called("gcsfuse")
    assert call[-1 - len(words) : -1] == words
    assert call[-2 - len(words)] == "--log-format=text"


def test_mount_point_with_spaces(machine):
    assert machine.run("bucket-1", "a place/of mine").returncode == 0
    (call,) = machine.called("gcsfuse")
    assert call[-1] == f"{machine.home}/a place/of mine"
    result = machine.run("bucket-1", "a place/of mine")
    assert "already" in result.stdout
    assert machine.run("--unmount", "a place/of mine").returncode == 0
    assert machine.called("fusermount") == [["fusermount", "-u", f"{machine.home}/a place/of mine"]]


def test_cache(machine):
    cache = machine.home / "a cache"
    result = machine.run("bucket-1", "shards", "--cache-dir", str(cache), "--cache-size", "200GB")
    assert result.returncode == 0, result.stderr
    (call,) = machine.called("gcsfuse")
    assert cache.is_dir()
    assert f"--cache-dir={cache}" in call
    assert "--file-cache-max-size-mb=190734" in call  # 200e9 / 2**20
    assert "--file-cache-cache-file-for-range-read" in call


@pytest.mark.parametrize(
    "words",
    [
        ("--cache-dir", "cache"),
        ("--cache-size", "200GB"),
        ("--cache-dir", "cache", "--cache-size", "plenty"),
        ("--cache-dir", "cache", "--cache-size", "-1"),
        ("--cache-dir", "cache", "--cache-size", "200KB"),
    ],
)
def test_cache_needs_a_folder_and_a_limit(machine, words):
    error = error_of(machine.run("bucket-1", "m", *words))
    assert "--cache-dir DIR and --cache-size SIZE must" in error
    assert not machine.called("gcsfuse")


def test_more_options_for_gcsfuse(machine):
    machine.run("bucket-1", "shards", "--", "--billing-project", "one of mine")
    (call,) = machine.called("gcsfuse")
    assert call[-4:-2] == ["--billing-project", "one of mine"]
    assert call[1:3] == ["-o", "ro"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_mount_point_that_needs_root(machine):
    (machine.home / "mnt").mkdir(mode=0o555)
    machine.stub("sudo")
    machine.run("bucket-1", "mnt/shards")
    (call,) = machine.called("sudo", "install")
    assert call[2:] == ["-d", "-o", "1000", "-g", "1000", f"{machine.home}/mnt/shards"]


def test_empty_bucket_is_reported(machine):
    (machine.state / "files").write_text("")
    result = machine.run("gs://bucket-1/shrads", "shards")
    assert result.returncode == 0
    assert "note: there are no files in gs://bucket-1/shrads" in result.stdout


# ----------------------------------------------------------------------------- once more


def test_second_run_changes_nothing(machine):
    machine.run("bucket-1", "shards")
    result = machine.run("gs://bucket-1", "shards")
    assert result.returncode == 0
    assert (
        result.stdout == f"gcs mount: gs://bucket-1 is already mounted on {machine.home}/shards\n"
    )
    assert not machine.called("gcsfuse") + machine.called("sudo") + machine.called("mkdir")


def test_mount_of_another_bucket_is_refused(machine):
    machine.mounted("shards", "bucket-2")
    error = error_of(machine.run("bucket-1", "shards"))
    assert f"bucket-2 (fuse.gcsfuse) is already mounted on {machine.home}/shards" in error
    assert not machine.called("gcsfuse") + machine.called("fusermount")


def test_mount_over_another_file_system_is_refused(machine):
    machine.mounted("disk", "/dev/sdb", "ext4")
    assert "/dev/sdb (ext4) is already mounted" in error_of(machine.run("bucket-1", "disk"))
    assert "not unmounted" in error_of(machine.run("--unmount", "disk"))
    assert not machine.called("fusermount")


@pytest.mark.parametrize(
    ("running", "requested", "same"),
    [
        ("--only-dir=a", "bucket-1/a", True),
        ("--only-dir=a", "bucket-1/b", False),
        ("--only-dir=a", "bucket-1", False),
        ("--log-format=text", "bucket-1", True),
        ("--log-format=text", "bucket-1/a", False),
    ],
)
def test_folders_of_one_bucket_are_distinguished(machine, running, requested, same):
    machine.mounted("shards", "bucket-1")
    (machine.state / "processes").write_text(
        f"40 gcsfuse --foreground -o ro --only-dir=z bucket-9 {machine.home}/elsewhere\n"
        f"41 gcsfuse --foreground -o ro {running} bucket-1 {machine.home}/shards\n"
    )
    result = machine.run(requested, "shards")
    if same:
        assert "already" in result.stdout
    else:
        assert "another folder of gs://bucket-1" in error_of(result)
    assert not machine.called("gcsfuse")


def test_dead_gcsfuse_is_replaced(machine):
    machine.mounted("shards", "bucket-1")
    (machine.state / "dead").touch()
    assert "does not respond" in error_of(machine.run("bucket-1", "shards"))
    assert machine.run("--unmount", "shards").returncode == 0


def test_folder_with_files_is_refused(machine):
    (machine.home / "mine").mkdir()
    (machine.home / "mine/thesis.tex").touch()
    error = error_of(machine.run("bucket-1", "mine"))
    assert f"{machine.home}/mine is not empty" in error
    assert (machine.home / "mine/thesis.tex").exists()
    assert not machine.called("gcsfuse")


def test_file_as_mount_point_is_refused(machine):
    (machine.home / "mine").touch()
    assert "is not a folder that you can write to" in error_of(machine.run("bucket-1", "mine"))


# ----------------------------------------------------------------------------- trouble


def test_failed_mount_is_retried(machine):
    machine.trouble("connection reset by peer", "connection reset by peer")
    result = machine.run("bucket-1", "shards")
    assert result.returncode == 0, result.stderr
    assert len(machine.called("gcsfuse")) == 3
    assert [call[1] for call in machine.called("sleep")] == ["1", "2"]
    assert "mounted: gs://bucket-1" in result.stdout


def test_failed_listing_is_retried_without_a_second_mount(machine):
    (machine.state / "unreadable").write_text("once\n")
    assert machine.run("bucket-1", "shards").returncode == 0
    assert len(machine.called("gcsfuse")) == 1
    assert [call[1] for call in machine.called("sleep")] == ["1"]


def test_mount_gives_up(machine):
    machine.trouble(*[f"connection reset by peer, no. {i}" for i in range(9)])
    result = machine.run("bucket-1", "shards")
    assert "could not be mounted" in error_of(result)
    assert [call[1] for call in machine.called("sleep")] == ["1", "2", "4", "8"]
    assert "connection reset by peer, no. 4" in result.stderr  # the end of the log
    assert (machine.home / "shards").is_dir()
    # The log of a later run begins where this one ended.
    machine.trouble("Error 404: The specified bucket does not exist")
    result = machine.run("bucket-1", "shards")
    assert "there is no bucket gs://bucket-1" in error_of(result)
    assert "connection reset" not in result.stderr


def test_unusable_mount_is_given_up(machine):
    (machine.state / "unreadable").write_text("again\n" * 9)
    result = machine.run("bucket-1", "shards")
    assert "could not be mounted" in error_of(result)
    assert "Input/output error" in result.stderr
    assert machine.called("fusermount") == [["fusermount", "-u", f"{machine.home}/shards"]]
    assert (machine.state / "mounts").read_text() == ""


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (
            "GetTokenSource: DefaultTokenSource: google: could not find default credentials.",
            "no valid Google credentials: run 'gcloud auth application-default login', or give "
            "the VM a service account with the access scope storage-ro",
        ),
        (
            'SetUpBucket: OpenBucket: Bad credentials for bucket "bucket-1": permission denied',
            "may not read gs://bucket-1: they need the role Storage Object Viewer",
        ),
        ('SetUpBucket: OpenBucket: Unknown bucket "bucket-1"', "there is no bucket gs://bucket-1"),
        ("unknown flag: --metadata-cache-negative-ttl-secs", "version 3 is required"),
    ],
)
def test_permanent_errors_are_not_retried(machine, message, error):
    machine.trouble(f"daemonize.Run: readFromProcess: sub-process: {message}")
    result = machine.run("bucket-1", "shards")
    assert error in error_of(result)
    assert message in result.stderr
    assert len(machine.called("gcsfuse")) == 1
    assert not machine.called("sleep")


@pytest.mark.parametrize(
    "bucket",
    ["", "gs://", "/shards", "s3://bucket", "Bucket-1", "b1", "bucket-", "my bucket", "a;b"],
)
def test_invalid_names(machine, bucket):
    assert f"'{bucket}' is not a bucket" in error_of(machine.run(bucket, "shards"))
    assert not machine.called("gcsfuse") + machine.called("mkdir")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a bucket and a mount point are required"),
        (["bucket-1"], "a bucket and a mount point are required"),
        (["bucket-1", "a", "b"], "a bucket and a mount point are required"),
        (["bucket-1", "a", "--force"], "unknown option: --force"),
        (["bucket-1", "a", "--cache-dir"], "the last option needs a value"),
        (["bucket-1", "a", "--lazy"], "--lazy requires --unmount"),
    ],
)
def test_invalid_options(machine, words, message):
    assert message in error_of(machine.run(*words))


def test_help(machine):
    result = machine.run("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: bash setup_gcs_mount.sh BUCKET MOUNT_POINT")
    assert len(result.stdout.splitlines()) < 20


# ----------------------------------------------------------------------------- installing


def test_gcsfuse_is_installed(machine):
    machine.without_gcsfuse()
    result = machine.run("bucket-1", "shards")
    assert result.returncode == 0, result.stderr
    queried, downloaded = machine.called("curl")[0], machine.called("sudo", "curl")[0]
    source = machine.called("sudo", "sh")[0][-1]
    release = queried[-1].removesuffix("/InRelease").rpartition("/")[2]
    assert release.startswith("gcsfuse-")
    assert downloaded[-2] == "/usr/share/keyrings/cloud.google.asc"
    assert "[signed-by=/usr/share/keyrings/cloud.google.asc]" in source
    assert f"/apt {release} main' >/etc/apt/sources.list.d/gcsfuse.list" in source
    assert [call[1:] for call in machine.called("apt-get")] == [
        ["update"],
        ["install", "-y", "-o", "DPkg::Lock::Timeout=300", "gcsfuse"],
    ]
    assert len(machine.called("gcsfuse")) == 1


def test_existing_package_source_is_used(machine):
    machine.without_gcsfuse()
    (machine.state / "offered").touch()
    assert machine.run("bucket-1", "shards").returncode == 0
    assert not machine.called("curl") + machine.called("sudo", "sh")
    assert machine.called("apt-get", "install")


@pytest.mark.parametrize("missing", ["release", "package", "apt-get"])
def test_gcsfuse_that_cannot_be_installed(machine, missing):
    machine.without_gcsfuse()
    if missing == "release":
        machine.stub("curl", "exit 22")  # as for HTTP 404
    elif missing == "package":
        (machine.state / "no-package").touch()
    else:
        (machine.bin / "apt-get").unlink()
    error = error_of(machine.run("bucket-1", "shards"))
    assert "gcsfuse could not be installed; to install it yourself:" in error
    assert bool(machine.called("sudo", "sh")) == (missing == "package")
    assert not (machine.home / "shards").exists()


# ----------------------------------------------------------------------------- unmounting, dry run


def test_unmount_twice(machine):
    machine.run("bucket-1", "shards")
    result = machine.run("--unmount", "shards")
    assert result.stdout == f"gcs mount: unmounted: {machine.home}/shards\n"
    assert machine.called("fusermount") == [["fusermount", "-u", f"{machine.home}/shards"]]
    result = machine.run("--unmount", "shards")
    assert result.returncode == 0
    assert result.stdout == f"gcs mount: nothing is mounted on {machine.home}/shards\n"
    assert not machine.called("fusermount")
    assert (machine.home / "shards").is_dir()


def test_unmount_with_bucket_name(machine):
    machine.mounted("shards", "bucket-2")
    assert "not unmounted" in error_of(machine.run("bucket-1", "shards", "--unmount"))
    assert machine.run("gs://bucket-2/a", "shards", "--unmount").returncode == 0
    assert (machine.state / "mounts").read_text() == ""


def test_unmount_while_in_use(machine):
    machine.mounted("shards", "bucket-1")
    (machine.state / "busy").touch()
    assert "or add --lazy" in error_of(machine.run("--unmount", "shards"))
    assert machine.run("--unmount", "shards", "--lazy").returncode == 0
    assert machine.called("fusermount", "-u", "-z")


def test_dry_run_changes_nothing(machine):
    result = machine.run(
        "gs://bucket-1/a", "my shards", "--dry-run", "--cache-dir", "c", "--cache-size", "1GiB"
    )
    assert result.returncode == 0, result.stderr
    place = f"{machine.home}/my\\ shards"
    assert result.stdout.splitlines()[0].split() == ["mkdir", "-p", *place.split()]
    assert "\ngcsfuse -o ro --implicit-dirs " in result.stdout
    assert "--file-cache-max-size-mb=1024" in result.stdout
    assert f" --only-dir=a bucket-1 {place} \n" in result.stdout
    assert list(machine.home.iterdir()) == []
    assert {call[0] for call in machine.calls} <= {"id", "findmnt", "ls", "pgrep", "mountpoint"}


def test_dry_run_of_the_installation(machine):
    machine.without_gcsfuse()
    result = machine.run("bucket-1", "shards", "--dry-run")
    assert result.returncode == 0, result.stderr
    for line in (
        "curl -fsSL -o /dev/null https://",
        "sudo curl -fsSL -o /usr/share/keyrings/cloud.google.asc https://",
        "sudo apt-get update",
        "sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y",
        "gcsfuse -o ro",
    ):
        assert f"\n{line}" in result.stdout
    assert {call[0] for call in machine.calls} <= {"id", "findmnt", "apt-cache"}


def test_dry_run_of_unmount(machine):
    machine.mounted("shards", "bucket-1")
    result = machine.run("--unmount", "shards", "--dry-run")
    assert result.stdout.split() == ["fusermount", "-u", f"{machine.home}/shards"]
    assert not machine.called("fusermount")


def test_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
