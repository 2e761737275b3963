"""Checks of versions, environment variables and wandb."""

from dataclasses import replace

import pytest

from rae_xla.config import load_config
from rae_xla.tools.doctor import software
from rae_xla.tools.doctor.finding import DoctorContext


def make_context(*overrides, config_given=True):
    return DoctorContext(load_config(None, overrides=list(overrides)), config_given, None)


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_this_environment_passes():
    found = by_name(software.check_versions(make_context()))
    assert {"python", "torch", "torch_xla", "transformers"} <= found.keys()
    assert all(finding.status in ("ok", "none") for finding in found.values())


@pytest.mark.parametrize(
    ("versions", "status", "text"),
    [
        ({"torch_xla": "2.7.0"}, "FAIL", "needs torch 2.7"),
        ({"torch_xla": None}, "none", None),
        ({"transformers": None}, "FAIL", "transformers is not installed"),
    ],
)
def test_incompatible_and_missing_packages_fail(monkeypatch, versions, status, text):
    here = software.installed
    monkeypatch.setattr(
        software, "installed", lambda name: versions[name] if name in versions else here(name)
    )
    [name] = versions
    finding = by_name(software.check_versions(make_context()))[name]
    assert finding.status == status
    assert text is None or text in finding.fix


def test_harmful_variables_are_warnings_and_secrets_are_not_printed(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    monkeypatch.setenv("WANDB_API_KEY", "the-secret")
    monkeypatch.setenv("XLA_USE_BF16", "1")
    monkeypatch.setenv("XLA_USE_SPMD", "0")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:1")
    found = by_name(software.check_environment(make_context()))
    assert found["MASTER_ADDR"].text == "10.0.0.7"
    assert found["XLA_USE_BF16"].status == "warn"
    assert "runtime.precision=bf16" in found["XLA_USE_BF16"].fix
    assert "XLA_USE_SPMD" not in found, "0 disables it"
    assert "not to Google Cloud" in found["STORAGE_EMULATOR_HOST"].fix
    assert "the-secret" not in repr(found)


def test_wandb_is_required_only_if_the_run_uses_it(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))

    def finding_of(*overrides, config_given=True):
        [finding] = software.check_tracking(make_context(*overrides, config_given=config_given))
        return finding

    assert finding_of().status == "none"
    failed = finding_of("tracking.wandb=true")
    assert failed.status == "FAIL"
    assert "WANDB_MODE=offline" in failed.fix
    assert finding_of(config_given=False).status == "none"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert finding_of("tracking.wandb=true").status == "ok"

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(software, "_logged_in", lambda: True)
    found = finding_of("tracking.wandb=true", "tracking.project=atlas")
    assert replace(found, text="") == replace(failed, status="ok", text="", fix=None)
    assert found.text.endswith("project atlas")
