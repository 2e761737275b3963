"""When a run evaluates what."""

from dataclasses import replace

from rae_xla.train.plan import Plan

PLAN = Plan(total=25, per_epoch=5, global_batch=8, log_every=1, sample_every=0, checkpoint_every=5,
            eval_every=10, eval_lite_every=4)  # fmt: skip


def kinds(plan):
    return {step: plan.evaluation(step) for step in range(1, 26) if plan.evaluation(step)}


def test_small_ones_until_the_first_whole_one_and_a_whole_one_at_the_end():
    assert kinds(PLAN) == {4: "lite", 8: "lite", 10: "whole", 20: "whole", 25: "whole"}
    assert kinds(replace(PLAN, eval_lite_every=5)) == {
        5: "lite", 10: "whole", 20: "whole", 25: "whole",
    }  # fmt: skip


def test_what_is_not_asked_for_does_not_happen():
    assert kinds(replace(PLAN, eval_lite_every=0)) == {10: "whole", 20: "whole", 25: "whole"}
    assert kinds(replace(PLAN, eval_every=0)) == {}
