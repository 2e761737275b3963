"""The cadence of evaluations."""

from dataclasses import replace

from rae_xla.train.cadence import Cadence

CADENCE = Cadence(
    total=25, per_epoch=5, global_batch=8, log_every=1, sample_every=0, checkpoint_every=5,
    eval_every=10, eval_lite_every=4,
)  # fmt: skip


def evaluations(cadence):
    return {step: cadence.evaluation(step) for step in range(1, 26) if cadence.evaluation(step)}


def test_lite_until_the_first_full_evaluation_and_a_full_one_at_the_end():
    assert evaluations(CADENCE) == {4: "lite", 8: "lite", 10: "full", 20: "full", 25: "full"}
    assert evaluations(replace(CADENCE, eval_lite_every=5)) == {
        5: "lite", 10: "full", 20: "full", 25: "full",
    }  # fmt: skip


def test_interval_zero_disables_an_evaluation():
    assert evaluations(replace(CADENCE, eval_lite_every=0)) == {10: "full", 20: "full", 25: "full"}
    assert evaluations(replace(CADENCE, eval_every=0)) == {}
