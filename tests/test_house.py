"""What DESIGN.md promises of the whole: names, arrows, and a tree that a stranger can use."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import rae_xla

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rae_xla"
MEGABYTE = 2**20


def files_of_the_project() -> list[Path]:
    """Every file git knows or would take (not what is built, installed or produced)."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def imports_of(path: Path) -> set[str]:
    """The modules a file imports anywhere, and for `from a import b` both `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# ----------------------------------------------------------------------------- public names


def defaults_of(function) -> dict[str, object]:
    """Parameter names and defaults in order, without `self`; `...` where there is no default."""
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: ... if p.default is p.empty else p.default for p in parameters if p.name != "self"
    }


def test_the_two_public_functions():
    assert list(defaults_of(rae_xla.load_config))[:2] == ["path", "overrides"]
    assert len(defaults_of(rae_xla.instantiate)) == 1


def test_create_transport_has_the_published_keywords():
    from rae_xla.transport import create_transport

    assert list(defaults_of(create_transport)) == [
        "path_type",
        "prediction",
        "loss_weight",
        "train_eps",
        "sample_eps",
        "time_dist_type",
        "time_dist_shift",
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
    assert promised.items() <= defaults_of(getattr(transport, method)).items()


def test_guided_and_the_models():
    from rae_xla.models.dit import LightningDiT
    from rae_xla.models.dit_dh import DiTDH
    from rae_xla.models.rae import RAE
    from rae_xla.transport import guided

    keywords = ["model", "y", "scale", "method", "null_label", "guide", "interval"]
    assert list(defaults_of(guided)) == keywords
    for model in (DiTDH, LightningDiT):
        assert list(defaults_of(model.forward))[:3] == ["x", "t", "y"]
    assert next(iter(defaults_of(RAE.encode))) == "images"
    assert next(iter(defaults_of(RAE.decode))) == "latents"


# ----------------------------------------------------------------------------- arrows


def test_every_module_but_the_xla_backend_imports_without_torch_xla():
    code = """
import importlib, pkgutil, sys
sys.modules["torch_xla"] = None  # as if it were not installed
import rae_xla
for module in pkgutil.walk_packages(rae_xla.__path__, "rae_xla."):
    if not module.name.startswith(("rae_xla.__main__", "rae_xla.runtime.xla")):
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


def test_import_contract():
    lint_imports = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint_imports], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("backend", "rooms"),
    [("torch_xla", {"runtime", "plan"}), ("torch.distributed", {"runtime"})],
)
def test_backends_are_imported_in_runtime_alone(backend, rooms):
    strays = [
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in rooms
        and any(f"{name}.".startswith(f"{backend}.") for name in imports_of(path))
    ]
    assert strays == []


# ----------------------------------------------------------------------------- tests


def test_no_test_is_lost():
    """test.sh takes test_*.py, runs *_xla.py apart, and picks by marker."""
    files = [p for p in files_of_the_project() if p.match("test_*.py")]
    assert {p.relative_to(ROOT).parts[0] for p in files} == {"tests"}
    assert [name for name, count in Counter(p.name for p in files).items() if count > 1] == []
    for path in files:
        tree = ast.parse(path.read_text())
        names = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert any(name.startswith("test_") for name in names), f"{path}: no test in it"
        on_xla = bool(re.search(r"^pytestmark = .*pytest\.mark\.xla", path.read_text(), re.M))
        assert on_xla == path.name.endswith("_xla.py"), f"{path}: mark and file name disagree"
        assert on_xla or not any(name.split(".")[0] == "torch_xla" for name in imports_of(path)), (
            f"{path}: needs torch_xla, so its name must end in _xla.py"
        )


# ----------------------------------------------------------------------------- the tree


def test_no_large_files():
    sizes = {p.relative_to(ROOT): p.stat().st_size for p in files_of_the_project()}
    assert [str(p) for p, size in sizes.items() if size > 5 * MEGABYTE] == []
    golden = sum(size for p, size in sizes.items() if p.parts[:2] == ("tests", "golden"))
    assert golden < 15 * MEGABYTE


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("a package registry", r"pypi\.(org|python)|pythonhosted\.|npmjs\.|download\.pytorch\."),
        ("where packages come from", r"--(extra-|default-)?index(-url)?[ =]|--find-links[ =]"),
        ("a folder of one machine", r"(?<![\w.$}\-])/(root|work|home/\w+|tmp/[a-z]+/[a-z])/?"),
    ],
)
def test_the_project_names_no(what, pattern):
    found = []
    for path in files_of_the_project():
        if path == Path(__file__) or path.suffix in {".safetensors", ".pt", ".png", ".npz"}:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []
