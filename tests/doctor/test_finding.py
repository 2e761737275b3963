"""Checks are run each for itself, and what they find is told."""

import json
import threading
from types import SimpleNamespace

from rae_xla.doctor import report
from rae_xla.doctor.finding import Finding, Patient, examine
from rae_xla.errors import UserError


def fine(patient):
    yield Finding("a", "one", "ok", "there")
    yield Finding("a", "two", "warn", "slow", "make it faster")


def refuses(patient):
    yield Finding("b", "three", "ok", "there")
    raise UserError("it does not fit: cut it")


def breaks(patient):
    raise ZeroDivisionError("so it is")
    yield


def findings(begun=None):
    checks = {"b": refuses, "c": breaks, "a": fine}
    begin = (lambda section: None) if begun is None else begun.append
    return list(examine(Patient(None, True, None), checks, begin))


def test_a_check_that_breaks_stops_no_other():
    begun = []
    assert [(f.section, f.status) for f in findings(begun)] == [
        ("b", "ok"), ("b", "FAIL"), ("c", "FAIL"), ("a", "ok"), ("a", "warn"),
    ]  # fmt: skip
    assert begun == ["b", "c", "a"]
    assert "ZeroDivisionError: so it is" in findings()[2].text
    assert "test_finding.py:" in findings()[2].text, "where"


def test_the_report_names_every_finding_and_ends_with_what_to_fix():
    assert [report.line(f) for f in findings()[:2]] == [
        "  ok    three: there", "  FAIL  it does not fit: cut it",
    ]  # fmt: skip
    assert report.line(findings()[-1]) == "  warn  two: slow"
    first, second, third = report.what_to_fix(findings())
    assert first == "FAIL: it does not fit: cut it"
    assert second.startswith("FAIL: c: ZeroDivisionError")
    assert third == "warn: make it faster"
    assert not report.healthy(findings())
    assert report.healthy(fine(None)), "a warning is no failure"


def test_json_holds_the_same():
    content = json.loads(report.as_json(findings()))
    assert content["ok"] is False
    assert content["fix"] == report.what_to_fix(findings())
    assert content["findings"][0] == {
        "section": "b", "name": "three", "status": "ok", "text": "there", "fix": None,
    }  # fmt: skip


def processes(count):
    """As many runtimes as a pod has processes, in threads: what one says all hear."""
    said, barrier = {}, threading.Barrier(count)

    def exchange(index, text):
        said[index] = text
        barrier.wait(30)
        texts = [said[i] for i in range(count)]
        barrier.wait(30)
        return texts

    return [
        SimpleNamespace(
            process_index=i, process_count=count, exchange=lambda text, i=i: exchange(i, text)
        )
        for i in range(count)
    ]


def test_the_troubles_of_other_hosts_are_told():
    heard = {}

    def one(runtime, own):
        heard[runtime.process_index] = report.troubles_elsewhere(runtime, own)

    runtimes = processes(2)
    other = threading.Thread(target=one, args=(runtimes[1], findings()))
    other.start()
    one(runtimes[0], fine(None))
    other.join()
    assert [f.status for f in heard[0]] == ["FAIL", "FAIL", "warn"]
    assert "(process 1): it does not fit: cut it" in heard[0][0].fix
    assert [f.text for f in heard[1]] == ["a two: slow"]
