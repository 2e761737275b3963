"""Tests of the rules for the entire project: names, imports, boundaries, language."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import rae_xla

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rae_xla"
MEGABYTE = 2**20
BINARY = {".safetensors", ".pt", ".png", ".npz"}


def project_files() -> list[Path]:
    """Return every file that git tracks or would add: nothing built, installed or produced."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def imported_modules(path: Path) -> set[str]:
    """Return the modules that a file imports; for `from a import b` both `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def lines_matching(pattern: str, *, outside: tuple[str, ...] = ()) -> list[str]:
    """Return the lines of the package that match, except in files or folders named by outside."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not str(path.relative_to(PACKAGE)).startswith(outside)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line.partition("  # ")[0])
    ]


# ----------------------------------------------------------------------------- public names


def parameters_of(function) -> dict[str, object]:
    """Return parameter names and defaults (`...` for none) in order, without `self`."""
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: ... if p.default is p.empty else p.default for p in parameters if p.name != "self"
    }


def test_public_functions():
    assert list(parameters_of(rae_xla.load_config))[:2] == ["path", "overrides"]
    assert len(parameters_of(rae_xla.instantiate)) == 1


def test_create_transport_has_the_published_keywords():
    from rae_xla.transport import create_transport

    assert list(parameters_of(create_transport)) == [
        "path_type",
        "prediction",
        "loss_weight",
        "train_eps",
        "sample_eps",
        "time_dist_type",
        "time_dist_shift",
        "t_eps",  # these two are not published
        "truncate_times",
    ]


@pytest.mark.parametrize(
    ("method", "promised"),
    [
        ("training_losses", {"model": ..., "data": ..., "t": None, "noise": None}),
        ("time_grid", {"num_steps": ...}),
        ("sample_ode", {"model_fn": ..., "noise": ..., "method": "euler", "num_steps": 50}),
        (
            "sample_sde",
            {
                "model_fn": ...,
                "method": "euler",
                "num_steps": 250,
                "diffusion_form": "sigma",
                "diffusion_norm": 1.0,
                "last_step": "Mean",
                "last_step_size": 0.04,
                "generator": None,
            },
        ),
    ],
)
def test_transport_methods(method, promised):
    from rae_xla.transport import create_transport

    transport = create_transport(time_dist_shift=6.93)
    assert promised.items() <= parameters_of(getattr(transport, method)).items()


def test_guided_and_model_signatures():
    from rae_xla.models.dit import LightningDiT
    from rae_xla.models.dit_dh import DiTDH
    from rae_xla.models.rae import RAE
    from rae_xla.transport import guided

    keywords = ["model", "y", "scale", "method", "null_label", "guide", "interval"]
    assert list(parameters_of(guided)) == [*keywords, "cfg", "null_scale"]
    for model in (DiTDH, LightningDiT):
        assert list(parameters_of(model.forward))[:3] == ["x", "t", "y"]
    assert next(iter(parameters_of(RAE.encode))) == "images"
    assert next(iter(parameters_of(RAE.decode))) == "latents"


# ----------------------------------------------------------------------------- imports


def test_import_contract():
    lint_imports = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint_imports], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_only_runtime_imports_torch_distributed():
    """The contract cannot tell it from torch. (checkpoint/ uses torch.distributed.checkpoint.)"""
    offenders = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] != "runtime"
        for name in sorted(imported_modules(path))
        if f"{name}.".startswith("torch.distributed.")
        and not f"{name}.".startswith("torch.distributed.checkpoint.")
    ]
    assert offenders == []


def test_only_the_xla_backend_needs_torch_xla():
    code = """
import importlib, pkgutil, sys
sys.modules["torch_xla"] = None  # as if it were not installed
import rae_xla
for module in pkgutil.walk_packages(rae_xla.__path__, "rae_xla."):
    if not module.name.startswith(("rae_xla.__main__", "rae_xla.runtime.xla.")):
        importlib.import_module(module.name)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_python_m_rae_xla():
    result = subprocess.run(
        [sys.executable, "-m", "rae_xla", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0
    assert "usage: rae-xla VERB" in result.stdout


# ----------------------------------------------------------------------------- boundaries


# These do not select an implementation: the doctor reports the device, the metric needs float64,
# which some devices lack, and the writer of samples keeps one batch in flight on accelerators.
DEVICE_CHECKS = ("tools/doctor/devices.py", "evaluate/precision_recall.py", "sample/sample_set.py")


def test_only_ops_and_runtime_dispatch_on_the_device():
    found = lines_matching(
        r"\bdevice\.type (==|!=|in|not in) ", outside=("ops/", "runtime/", *DEVICE_CHECKS)
    )
    assert found == []


def test_only_compat_uses_private_apis_of_torch_xla():
    private = r"_XLAC|\b(torch_xla|xm|xr|xs|met|xp)\._(?!_)|from torch_xla[\w.]* import .*\b_\w"
    assert lines_matching(private, outside=("runtime/xla/compat.py",)) == []


# Messages between the two processes of wandb travel through a pipe, not to the user.
PRINTS = ("cli/", "train/tracking/wandb_process.py")


def test_only_the_command_line_prints():
    """Everything else uses logging; the exceptions stand in PRINTS."""
    assert lines_matching(r"(?<![\w.])print\(", outside=PRINTS) == []


def test_no_object_changes_its_class():
    assert lines_matching(r"\.__class__ *=(?!=)") == []


# ----------------------------------------------------------------------------- tests


def test_no_test_is_lost():
    """scripts/test.sh collects test_*.py, runs *_xla.py separately, and selects by marker."""
    files = [p for p in project_files() if p.match("test_*.py")]
    assert {p.relative_to(ROOT).parts[0] for p in files} == {"tests"}
    assert [name for name, count in Counter(p.name for p in files).items() if count > 1] == []
    for path in files:
        tree = ast.parse(path.read_text())
        names = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert any(name.startswith("test_") for name in names), f"{path}: no test in it"
        on_xla = bool(re.search(r"^pytestmark = .*pytest\.mark\.xla", path.read_text(), re.M))
        assert on_xla == path.name.endswith("_xla.py"), f"{path}: mark and file name disagree"
        assert on_xla or not any(
            name.split(".")[0] == "torch_xla" for name in imported_modules(path)
        ), f"{path}: needs torch_xla, so its name must end in _xla.py"


# ----------------------------------------------------------------------------- files


def test_no_large_files():
    sizes = {p.relative_to(ROOT): p.stat().st_size for p in project_files()}
    assert [str(p) for p, size in sizes.items() if size > 5 * MEGABYTE] == []
    golden = sum(size for p, size in sizes.items() if p.parts[:2] == ("tests", "golden"))
    assert golden < 25 * MEGABYTE


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("a package registry", r"pypi\.(org|python)|pythonhosted\.|npmjs\.|download\.pytorch\."),
        ("a package index option", r"--(extra-|default-)?index(-url)?[ =]|--find-links[ =]"),
        ("a folder of one machine", r"(?<![\w.$}\-])/(root|work|home/\w+|tmp/[a-z]+/[a-z])/?"),
    ],
)
def test_the_project_names_no(what, pattern):
    found = []
    for path in project_files():
        if path == Path(__file__) or path.suffix in BINARY:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


# ----------------------------------------------------------------------------- language

# Words of the idiolect that this code was once written in, and what to write instead. Only words
# that have no technical meaning here are listed, so that a match is always a mistake.
IDIOLECT = {
    r"anew": "again, new",
    r"beside": "next to, alongside",
    r"be had": "be found, be read, be downloaded",
    r"(every|no|some)body": "all users, no process, ...",
    r"forgetful": "rematerialised",
    r"houses?": "project, package",
    r"journeys?": "(name the event)",
    r"mend(s|ed|ing)?": "fix, repair, retry",
    r"patient": "(name the timeout)",
    r"pictures?": "image",
    r"put together|tak(e|es|en) apart": "assemble, split",
    r"rooms?": "package",
    r"(is|are|was|were|been) said": "is logged, is reported",
    r"speaks?|speakers?": "log, report; logging process",
    r"strangers?": "user",
    r"superfluous": "redundant, unused",
    r"told": "reported, logged, passed",
    r"belongs? together": "match",
}
FILE_FORMAT_KEY = '"pictures"'  # in the listing of generated images
WORDS = re.compile(rf"(?<![\w-])({'|'.join(IDIOLECT)})(?![\w-])", re.IGNORECASE)


def readable_lines() -> Iterator[tuple[str, str]]:
    """Yield (place, line) of everything that a person reads; underscores are spaces."""
    for path in project_files():
        name = str(path.relative_to(ROOT))
        yield f"{name} (file name)", path.stem.replace("_", " ")
        if path.suffix in {".py", ".md", ".sh", ".yaml", ".html"} and path != Path(__file__):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                yield f"{name}:{number}", line.replace(FILE_FORMAT_KEY, "").replace("_", " ")


def test_language():
    found = [
        f"{place}: {match[0]!r} in: {line.strip()[:90]}"
        for place, line in readable_lines()
        if (match := WORDS.search(line))
    ]
    assert found == []
