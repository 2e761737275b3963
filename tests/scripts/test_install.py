"""Tests of install_spmd.sh, with small stub programs instead of Python, uv and nvidia-smi."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

# A stub Python: it derives its version from its name, creates an environment that contains itself,
# and records what it should install.
PYTHON = """#!/usr/bin/env bash
case "$1 ${2:-} ${3:-}" in
    "- "*) # usable_python: the requested version, the path of uv
        minor=${0##*python3.}
        [[ $minor =~ ^1[012]$ && ( -z $2 || $2 == "3.$minor" ) ]] && echo "$0" ;;
    "-m venv "*)
        mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" ;;
    "-m pip install"*)
        echo "pip $*" >> "$CALLS"
        [[ ! -e $BREAK ]] || { echo "No space left on device"; exit 1; } ;;
    --version*) echo "Python 3 of $0" ;;
    "-c "*) [[ -z $2 ]] || echo "imported" ;;
esac
"""

UV = """#!/usr/bin/env bash
case $1 in
    python) exit 1 ;;
    venv) mkdir -p "${!#}/bin" && cp "$4" "${!#}/bin/python" ;;
    pip) echo "uv $*" >> "$CALLS" ;;
esac
"""


class Machine:
    """A home directory, a PATH and a copy of the installer, all under one folder."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "project"
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        self.broken = folder / "broken"
        self.bin.mkdir()
        (self.project / "scripts").mkdir(parents=True)
        for name in ("install_spmd.sh", "scripts/lib_install.sh", "requirements.lock"):
            shutil.copy(ROOT / name, self.project / name)
        shutil.copy(ROOT / "pyproject.toml", self.project)
        tools = "bash cat cksum cp cut dirname env flock grep ls mkdir rm sleep tail"
        for tool in tools.split():
            self.link(tool)
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "CALLS": str(self.calls),
            "BREAK": str(self.broken),
        }

    def link(self, tool: str) -> None:
        where = shutil.which(tool)
        assert where, f"this test needs {tool}"
        (self.bin / tool).symlink_to(where)

    def program(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def shell(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.project,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def install(self, arguments: str = "") -> subprocess.CompletedProcess[str]:
        """Run the installer; `.installed` is the package line passed to pip or uv, if any."""
        self.calls.write_text("")
        result = self.shell(f"bash install_spmd.sh {arguments}")
        self.installed = "".join(
            line for line in self.calls.read_text().splitlines() if "--editable" in line
        )
        return result


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    machine.program("python3.11", PYTHON)
    return machine


# ----------------------------------------------------------------------------- accelerators


def detect(machine: Machine, **environment: str) -> str:
    root = machine.project / "root"
    result = machine.shell(f". scripts/lib_install.sh; detect_accelerator {root}", **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def add_device(machine: Machine, path: str, text: str = "") -> None:
    file = machine.project / "root" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def add_pci_device(machine: Machine, vendor: str, kind: str) -> None:
    add_device(machine, "sys/bus/pci/devices/0000:00:05.0/vendor", vendor + "\n")
    add_device(machine, "sys/bus/pci/devices/0000:00:05.0/device", kind + "\n")


def test_no_accelerator_is_cpu(machine):
    assert detect(machine) == "cpu"


def test_early_tpu_is_detected_by_its_device_file(machine):
    add_device(machine, "dev/accel0")
    assert detect(machine) == "tpu"


def test_accelerator_of_another_vendor_is_not_a_tpu(machine):
    add_device(machine, "dev/accel/accel0")
    assert detect(machine) == "cpu"


def test_later_tpu_is_detected_by_its_pci_id(machine):
    add_device(machine, "dev/vfio/0")
    add_pci_device(machine, "0x1ae0", "0x006f")
    assert detect(machine) == "tpu"


@pytest.mark.parametrize(("vendor", "kind"), [("0x1ae0", "0x0042"), ("0x10de", "0x0063")])
def test_other_vfio_devices_are_not_tpus(machine, vendor, kind):
    add_device(machine, "dev/vfio/0")
    # A Google network card, and a device of another vendor that has the id of a TPU.
    add_pci_device(machine, vendor, kind)
    assert detect(machine) == "cpu"


def test_later_tpu_is_detected_by_its_environment_variables(machine):
    add_device(machine, "dev/vfio/0")
    assert detect(machine, TPU_WORKER_ID="0") == "tpu"


def test_nvidia_gpu_is_detected(machine):
    machine.program("nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: H200 (UUID: x)'\n")
    assert detect(machine) == "cuda"


@pytest.mark.parametrize("text", ["exit 9", "echo 'No devices were found'"])
def test_driver_without_a_gpu_is_cpu(machine, text):
    machine.program("nvidia-smi", f"#!/usr/bin/env bash\n{text}\n")
    assert detect(machine) == "cpu"


# ----------------------------------------------------------------------------- which Python


def test_newest_supported_python_is_chosen(machine):
    for minor in (9, 10, 12, 13):
        machine.program(f"python3.{minor}", PYTHON)
    assert f"Python: {machine.bin}/python3.12\n" in machine.install().stdout


def test_pyenv_version_is_found_behind_a_broken_shim(machine):
    machine.program("python3.12", "#!/usr/bin/env bash\nexit 127\n")
    versions = Path(machine.environment["HOME"]) / ".pyenv/versions/3.12.1/bin"
    versions.mkdir(parents=True)
    shutil.copy(machine.bin / "python3.11", versions / "python3.12")
    assert f"Python: {versions}/python3.12\n" in machine.install().stdout


def test_requested_python_is_chosen(machine):
    machine.program("python3.10", PYTHON)
    machine.program("python3.12", PYTHON)
    assert f"Python: {machine.bin}/python3.10\n" in machine.install("--python 3.10").stdout


@pytest.mark.parametrize("requested", ["3.12", "3.13", "/nowhere/python", ""])
def test_missing_python_is_an_error(machine, requested):
    if not requested:
        (machine.bin / "python3.11").unlink()
    result = machine.install(f"--python {requested}" if requested else "")
    assert result.returncode == 2
    assert "3.10 to 3.12" in result.stderr
    assert not (machine.project / ".venv").exists()


# ----------------------------------------------------------------------------- the installation


@pytest.mark.parametrize(
    ("accelerator", "extras"),
    [
        ("cpu", "xla,plan,quickstart,hub,dashboard,dev"),
        ("tpu", "tpu,xla,quickstart,hub,dashboard,dev"),
        ("cuda", "quickstart,hub,dashboard,dev"),
    ],
)
def test_extras_of_each_accelerator(machine, accelerator, extras):
    result = machine.install(f"--accelerator {accelerator}")
    assert result.returncode == 0, result.stderr
    assert f"accelerator: {accelerator} (requested)" in result.stdout
    assert machine.installed.startswith("pip ")
    assert machine.installed.endswith(f"--editable .[{extras}]")
    assert "--constraint requirements.lock" in machine.installed


# A uv that can install Python 3.12.
UV_WITH_PYTHON = """#!/usr/bin/env bash
case "$1 ${2:-}" in
    "python install") [[ ! -e $BREAK ]] && cp "$PYTHON_3_12" "$HOME/python3.12" ;;
    "python find") [[ $3 == --system ]] && echo "$HOME/python3.12" ;;
    "venv "*) mkdir -p "${!#}/bin" && cp "$4" "${!#}/bin/python" ;;
    "pip "*) echo "uv $*" >> "$CALLS" ;;
esac
"""


@pytest.fixture
def tpu_vm(tmp_path):
    """A TPU VM, whose newest Python is 3.10."""
    machine = Machine(tmp_path)
    machine.program("python3.10", PYTHON)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    machine.environment["PYTHON_3_12"] = str(python)
    return machine


def test_a_tpu_vm_gets_a_python_that_can_run_flash_attention(tpu_vm):
    tpu_vm.program("uv", UV_WITH_PYTHON)
    result = tpu_vm.install("--accelerator tpu")
    assert result.returncode == 0, result.stderr
    assert f"Python: {tpu_vm.environment['HOME']}/python3.12\n" in result.stdout
    assert "Python 3.12 is being installed" in result.stderr
    assert "--editable .[tpu,xla" in tpu_vm.installed
    assert "ready: .venv, tpu (as before)" in tpu_vm.install().stdout


def test_uv_is_installed_to_install_python(tpu_vm):
    uv = tpu_vm.program("uv-of-pip", UV_WITH_PYTHON)
    pip = '[[ $* != *--target* ]] || { mkdir -p "$6/bin" && cp "$UV" "$6/bin/uv"; exit; }'
    tpu_vm.program("python3.10", PYTHON.replace('case "$1', f'{pip}\ncase "$1'))
    tpu_vm.environment["UV"] = str(uv)
    result = tpu_vm.install("--accelerator tpu")
    assert result.returncode == 0, result.stderr
    assert "/python3.12\n" in result.stdout
    assert (Path(tpu_vm.environment["HOME"]) / ".cache/rae_xla/uv/bin/uv").exists()


def test_without_a_network_a_tpu_vm_keeps_its_python(tpu_vm):
    tpu_vm.program("uv", UV_WITH_PYTHON)
    tpu_vm.broken.touch()
    result = tpu_vm.install("--accelerator tpu")
    assert result.returncode == 0, result.stderr
    assert f"Python: {tpu_vm.bin}/python3.10\n" in result.stdout
    assert "attention will be slower" in result.stderr


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_other_machines_keep_their_python(tpu_vm, accelerator):
    tpu_vm.program("uv", UV_WITH_PYTHON)
    result = tpu_vm.install(f"--accelerator {accelerator}")
    assert f"Python: {tpu_vm.bin}/python3.10\n" in result.stdout


def test_a_newer_python_of_a_tpu_vm_is_used(tpu_vm):
    tpu_vm.program("python3.11", PYTHON)
    tpu_vm.program("uv", UV_WITH_PYTHON)
    result = tpu_vm.install("--accelerator tpu")
    assert f"Python: {tpu_vm.bin}/python3.11\n" in result.stdout
    assert "being installed" not in result.stderr


def test_uv_is_used_where_available(machine):
    machine.program("uv", UV)
    result = machine.install()
    assert result.returncode == 0, result.stderr
    assert "installer: uv" in result.stdout
    assert machine.installed.startswith("uv pip install --python .venv/bin/python --constraints")


def test_second_run_returns_at_once(machine):
    machine.install("--accelerator cuda")
    begin = time.monotonic()
    result = machine.install()
    assert time.monotonic() - begin < 2
    assert result.stdout.startswith("install: ready: .venv, cuda (as before)")
    assert machine.calls.read_text() == ""


def test_check_reports_the_state_and_changes_nothing(machine):
    missing = machine.install("--check")
    assert missing.returncode == 1
    assert "not ready" in missing.stdout
    assert not (machine.project / ".venv").exists()
    machine.install("--accelerator cuda")
    ready = machine.install("--check")
    assert ready.returncode == 0
    assert ready.stdout.startswith("install: ready: .venv, cuda")
    other = machine.install("--accelerator cpu --check")
    machine.project = machine.project.rename(machine.project.with_name("moved"))
    moved = machine.install("--check")
    assert (other.returncode, moved.returncode) == (1, 1)
    assert machine.calls.read_text() == ""
    assert (machine.project / ".venv/bin/python").exists()


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml"])
def test_changed_versions_are_installed_in_place(machine, name):
    machine.install()
    marker = machine.project / ".venv/marker"
    marker.touch()
    with (machine.project / name).open("a") as file:
        file.write("# changed\n")
    machine.install()
    assert machine.installed
    assert marker.exists()


def test_changed_accelerator_recreates_the_environment(machine):
    machine.install("--accelerator cpu")
    (machine.project / ".venv/marker").touch()
    result = machine.install("--accelerator cuda")
    assert "recreating it" in result.stdout
    assert machine.installed.endswith("--editable .[quickstart,hub,dashboard,dev]")
    assert not (machine.project / ".venv/marker").exists()


def test_moved_project_recreates_the_environment(machine, tmp_path):
    machine.install()
    machine.project = machine.project.rename(tmp_path / "elsewhere")
    assert "recreating it" in machine.install().stdout
    assert machine.installed


def test_interrupted_installation_is_resumed(machine):
    machine.broken.touch()
    result = machine.install("--accelerator cuda")
    assert result.returncode == 2
    assert "No space left on device" in result.stderr  # the end of the log
    assert "failed; the full log" in result.stderr
    machine.broken.unlink()
    result = machine.install()
    assert result.returncode == 0
    assert machine.installed.endswith(
        "--editable .[quickstart,hub,dashboard,dev]"
    )  # the choice is remembered
    assert machine.install().stdout.startswith("install: ready:")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_stops_the_running_step(machine, sent):
    pid_file = machine.project / "pid"
    machine.program(
        "python3.11", PYTHON.replace('echo "pip $*"', f"echo $$ > {pid_file}; exec sleep 60; echo")
    )
    script = subprocess.Popen(
        ["bash", "install_spmd.sh"],
        cwd=machine.project,
        env=machine.environment,
        start_new_session=True,
    )
    while not (pid_file.exists() and pid_file.read_text().strip()):
        time.sleep(0.05)
    os.killpg(script.pid, sent)  # a terminal signals the whole process group
    assert script.wait(timeout=10) != 0
    assert ended(int(pid_file.read_text()))


def ended(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_removed_python_recreates_the_environment(machine):
    machine.install()
    (machine.project / ".venv/bin/python").unlink()
    assert "is broken: recreating it" in machine.install().stdout
    assert machine.installed


def test_foreign_folder_is_not_touched(machine):
    (machine.project / "mine").mkdir()
    (machine.project / "mine/thesis.tex").touch()
    result = machine.install("--venv mine")
    assert result.returncode == 2
    assert "mine exists and was not created by this script" in result.stderr
    assert (machine.project / "mine/thesis.tex").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--accelerator gpu", "--accelerator must be tpu, cuda or cpu"),
        ("--accelerator", "the last option has no value"),
        ("--prefix x", "unknown option: --prefix"),
    ],
)
def test_invalid_options_are_rejected(machine, arguments, message):
    result = machine.install(arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (machine.project / ".venv").exists()


def test_concurrent_runs_install_once(machine):
    slow = PYTHON.replace('"-m venv "*)', '"-m venv "*)\n        sleep 1')
    machine.program("python3.11", slow)
    machine.calls.write_text("")
    result = machine.shell("bash install_spmd.sh & sleep 0.3; bash install_spmd.sh; wait")
    assert result.returncode == 0, result.stderr
    assert "another installation is running" in result.stdout
    assert machine.calls.read_text().count("--editable") == 1


# ----------------------------------------------------------------------------- requirements.lock


def test_every_dependency_is_pinned():
    names = [
        line.split("==")[0].split("[")[0].lower().replace("_", "-")
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line and not line.startswith((" ", "#"))
    ]
    assert len(names) > 50
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for requirement in chain(project["dependencies"], *extras):
        name = requirement.split(";")[0]
        for mark in ("[", "=", ">", "<"):
            name = name.split(mark)[0]
        assert name.strip().lower().replace("_", "-") in names, f"{name} is not in the lock"


def test_real_environment_is_ready():
    """Check the environment of this process, which install_spmd.sh may have created."""
    record = Path(sys.prefix) / "rae-xla.install"
    if not record.exists() or record.read_text().splitlines()[0].split("\t")[2] != str(ROOT):
        pytest.skip("install_spmd.sh did not create this environment for this checkout")
    begin = time.monotonic()
    result = subprocess.run(
        ["bash", "install_spmd.sh", "--venv", sys.prefix, "--check"],  # never installs anything
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.monotonic() - begin < 5
    if "has to be installed or updated" in result.stdout:
        pytest.skip("requirements.lock, pyproject.toml or install_spmd.sh changed: install first")
    assert result.stdout.startswith("install: ready:"), result.stdout + result.stderr
