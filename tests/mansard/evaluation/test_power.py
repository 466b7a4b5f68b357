"""What attempts may spend, and guards that are refused before training."""

import pytest

from mansard.errors import BadInput
from mansard.evaluation.power import alpha_of_attempt, check_power, plan_guard, power_at_no_change, size_needed
from mansard.specs.judging import Suite, SuiteRole

BITS = Suite(format=1, name="docs", kind="bits_per_byte", items="a.jsonl")
QUESTIONS = Suite(format=1, name="quiz", kind="multiple_choice", items="a.jsonl")


def guard(margin: float = 0.02, **fields: float) -> SuiteRole:
    return SuiteRole(suite="a.yaml", role="guard", margin=margin, **fields)


def test_all_attempts_together_spend_alpha() -> None:
    spent = [alpha_of_attempt(0.05, k) for k in range(1, 20_000)]
    assert spent == sorted(spent, reverse=True) and 0.04999 < sum(spent) <= 0.05
    with pytest.raises(ValueError, match="count from 1"):
        alpha_of_attempt(0.05, 0)


def test_power_of_independent_answers_is_the_textbooks() -> None:
    """n = (1.645 + 0.842)^2 * 0.2 / 0.05^2."""
    assert size_needed(0.05, 0.2**0.5, 0.05) == 495
    assert power_at_no_change(0.05, 0.2**0.5, 495, 0.05) == pytest.approx(0.8, abs=0.001)


@pytest.mark.parametrize("skewness", [0.0, 3.0])
@pytest.mark.parametrize("alpha", [0.05, 0.03, 0.001])
def test_the_size_that_is_named_is_the_least_that_is_enough(alpha: float, skewness: float) -> None:
    needed = size_needed(0.02, 0.05, alpha, skewness)
    assert needed is not None
    assert power_at_no_change(0.02, 0.05, needed, alpha, skewness) >= 0.8
    assert power_at_no_change(0.02, 0.05, needed - 1, alpha, skewness) < 0.8


def test_a_suite_too_small_for_its_margin_is_refused_and_the_files_needed_are_named() -> None:
    needed = plan_guard(guard(), "bits_per_byte", 300, 20, 0.03).needed
    with pytest.raises(BadInput, match=f"docs: with 20 source files, a margin of 0.02 .*: {needed} source files are"):
        check_power(guard(), BITS, 300, 20, 0.03)
    check_power(guard(), BITS, 300, needed or 0, 0.03)


def test_questions_are_counted_by_item_and_their_files_are_named_too() -> None:
    with pytest.raises(BadInput, match=r"quiz: with 300 items.* 591 items are needed \(about 237 source files at 2.5 "):
        check_power(guard(0.05), QUESTIONS, 300, 120, alpha_of_attempt(0.05, 1))
    check_power(guard(0.05), QUESTIONS, 591, 237, alpha_of_attempt(0.05, 1))
    check_power(guard(0.05, expected_discordance=0.1), QUESTIONS, 300, 120, alpha_of_attempt(0.05, 1))
    with pytest.raises(BadInput, match="items are needed"):
        check_power(guard(0.05, expected_design_effect=1.5), QUESTIONS, 590, 236, alpha_of_attempt(0.05, 1))


def test_a_later_attempt_needs_a_larger_suite() -> None:
    check_power(guard(), BITS, 300, 120, alpha_of_attempt(0.05, 1))
    with pytest.raises(BadInput, match="source files are needed"):
        check_power(guard(), BITS, 300, 120, alpha_of_attempt(0.05, 5))


def test_a_guard_without_margin_or_of_unknown_size_is_refused() -> None:
    with pytest.raises(BadInput, match="margin 0 can never be shown"):
        check_power(guard(0.0), BITS, 300, 120, 0.05)
    with pytest.raises(BadInput, match="needs limit"):
        check_power(guard(), Suite(format=1, name="task", kind="harness", task="arc_easy"), 0, 0, 0.05)
    with pytest.raises(BadInput, match="quiz: with 0 items"):
        check_power(guard(), QUESTIONS, 0, 0, 0.05)


def test_targets_and_reported_suites_need_no_power_at_no_change() -> None:
    for role in ("target", "report"):
        check_power(SuiteRole(suite="a.yaml", role=role), BITS, 1, 1, 0.001)  # type: ignore[arg-type]
