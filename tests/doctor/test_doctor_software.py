"""Versions, variables and wandb, as they are here and as they might be."""

from dataclasses import replace

import pytest

from rae_xla.config import load_config
from rae_xla.doctor import software
from rae_xla.doctor.finding import Patient


def patient(*overrides, named=True):
    return Patient(load_config(None, overrides=list(overrides)), named, None)


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_this_environment_is_fit():
    found = by_name(software.check_versions(patient()))
    assert {"python", "torch", "torch_xla", "transformers"} <= found.keys()
    assert all(finding.status in ("ok", "none") for finding in found.values())


@pytest.mark.parametrize(
    ("versions", "status", "text"),
    [
        ({"torch_xla": "2.7.0"}, "FAIL", "works with torch 2.7 only"),
        ({"torch_xla": None}, "none", None),
        ({"transformers": None}, "FAIL", "transformers is not installed"),
    ],
)
def test_what_does_not_pair_fails(monkeypatch, versions, status, text):
    here = software.installed
    monkeypatch.setattr(
        software, "installed", lambda name: versions[name] if name in versions else here(name)
    )
    [name] = versions
    finding = by_name(software.check_versions(patient()))[name]
    assert finding.status == status
    assert text is None or text in finding.fix


def test_variables_that_spoil_a_run_are_told_and_secrets_are_not(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    monkeypatch.setenv("WANDB_API_KEY", "the-secret")
    monkeypatch.setenv("XLA_USE_BF16", "1")
    monkeypatch.setenv("XLA_USE_SPMD", "0")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:1")
    found = by_name(software.check_environment(patient()))
    assert found["MASTER_ADDR"].text == "10.0.0.7"
    assert found["XLA_USE_BF16"].status == "warn"
    assert "runtime.precision=bf16" in found["XLA_USE_BF16"].fix
    assert "XLA_USE_SPMD" not in found, "0 is off"
    assert "not Google" in found["STORAGE_EMULATOR_HOST"].fix
    assert "the-secret" not in repr(found)


def test_wandb_is_asked_for_only_where_it_is_used(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))

    def status(*overrides, named=True):
        [finding] = software.check_tracking(patient(*overrides, named=named))
        return finding

    assert status().status == "none"
    wanted = status("tracking.wandb=true")
    assert wanted.status == "FAIL"
    assert "WANDB_MODE=offline" in wanted.fix
    assert status(named=False).status == "none"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert status("tracking.wandb=true").status == "ok"

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(software, "_logged_in", lambda: True)
    found = status("tracking.wandb=true", "tracking.project=atlas")
    assert replace(found, text="") == replace(wanted, status="ok", text="", fix=None)
    assert found.text.endswith("project atlas")
