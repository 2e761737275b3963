"""Running checks, and output of their findings."""

import json

from thread_processes import run_in_threads

from rae_xla.errors import UserError
from rae_xla.tools.doctor import output
from rae_xla.tools.doctor.finding import DoctorContext, Finding, run_checks


def passes(context):
    yield Finding("a", "one", "ok", "there")
    yield Finding("a", "two", "warn", "slow", "make it faster")


def raises_user_error(context):
    yield Finding("b", "three", "ok", "there")
    raise UserError("it does not fit: reduce it")


def crashes(context):
    raise ZeroDivisionError("a bug")
    yield


def findings(sections=None):
    checks = {"b": raises_user_error, "c": crashes, "a": passes}
    on_section = (lambda section: None) if sections is None else sections.append
    return list(run_checks(DoctorContext(None, True, None), checks, on_section))


def test_a_check_that_raises_does_not_stop_the_others():
    sections = []
    assert [(f.section, f.status) for f in findings(sections)] == [
        ("b", "ok"), ("b", "FAIL"), ("c", "FAIL"), ("a", "ok"), ("a", "warn"),
    ]  # fmt: skip
    assert sections == ["b", "c", "a"]
    assert "ZeroDivisionError: a bug" in findings()[2].text
    assert "test_finding.py:" in findings()[2].text, "where"


def test_text_output_of_findings_and_fixes():
    assert [output.format_finding(f) for f in findings()[:2]] == [
        "  ok    three: there", "  FAIL  it does not fit: reduce it",
    ]  # fmt: skip
    assert output.format_finding(findings()[-1]) == "  warn  two: slow"
    first, second, third = output.fixes(findings())
    assert first == "FAIL: it does not fit: reduce it"
    assert second.startswith("FAIL: c: ZeroDivisionError")
    assert third == "warn: make it faster"
    assert not output.passed(findings())
    assert output.passed(passes(None)), "a warning is not a failure"


def test_json_output_of_findings():
    content = json.loads(output.findings_json(findings()))
    assert content["ok"] is False
    assert content["fix"] == output.fixes(findings())
    assert content["findings"][0] == {
        "section": "b", "name": "three", "status": "ok", "text": "there", "fix": None,
    }  # fmt: skip


def test_problems_of_other_hosts_are_reported():
    own = [list(passes(None)), findings()]
    of_first, of_second = run_in_threads(
        2, lambda backend: output.problems_of_other_hosts(backend, own[backend.process_index])
    )
    assert [f.status for f in of_first] == ["FAIL", "FAIL", "warn"]
    assert "(process 1): it does not fit: reduce it" in of_first[0].fix
    assert [f.text for f in of_second] == ["a two: slow"]
