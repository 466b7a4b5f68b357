"""The rules of decision 10, example by example and as laws over random histories."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mansard.errors import BadInput, Conflict
from mansard.release.events import Entry, Pointers, as_text
from mansard.release.pointer import (
    after_move,
    needs_new_approval,
    once_stable,
    plan_rollback,
    previous_of,
    recent_move,
    rollback_target,
    stable_of,
)

LAW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
START = datetime(2025, 3, 30, 0, 55, tzinfo=UTC)


class Story:
    """A history written by hand: every verb adds an entry, ten minutes after the one before."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.pointers = Pointers()
        self.now = START

    def add(self, kind: str, version: int, to: int | None = None, who: str = "ada", model: str = "demo") -> None:
        self.now += timedelta(minutes=10)
        body = {"version": version} if to is None else {"version": version, "to": to}
        entry = Entry(len(self.entries) + 1, model, kind, as_text(self.now), who, "", body, "", "")
        if model == "demo" and kind not in ("approved", "rejected"):
            self.pointers = after_move(self.entries, entry, self.pointers, self.pointers.term + 1)
        self.entries.append(entry)

    def promote(self, *versions: int) -> "Story":
        for version in versions:
            self.add("rollout_started", version)
            self.add("canary_step", version)
            self.add("promoted", version)
        return self

    def back(self, to: int | None = None) -> "Story":
        target = rollback_target(self.entries, "demo", to)
        assert self.pointers.stable is not None
        self.add("rolled_back", self.pointers.stable, target)
        return self


def test_previous_is_the_stable_before() -> None:
    assert Story().pointers.previous is None
    assert Story().promote(1).pointers == Pointers(1, None, None, 3)
    assert Story().promote(1, 2).pointers.previous == 1
    assert Story().promote(1, 2, 3).pointers.previous == 2


def test_previous_skips_versions_that_were_rolled_back() -> None:
    assert Story().promote(1, 2).back().pointers == Pointers(1, None, None, 7)
    assert Story().promote(1, 2).back().promote(3).pointers.previous == 1
    assert Story().promote(1, 2, 3).back().pointers.previous == 1
    assert Story().promote(1, 2, 3).back().promote(4).pointers.previous == 2


def test_a_rolled_back_version_counts_again_once_it_is_promoted_again() -> None:
    story = Story().promote(1, 2).back().promote(2)
    assert story.pointers.previous == 1
    assert story.promote(3).pointers.previous == 2


def test_a_newer_promotion_of_an_old_version_makes_it_the_newest() -> None:
    story = Story().promote(1, 2, 1)
    assert (story.pointers.stable, story.pointers.previous) == (1, 2)
    assert story.back().pointers == Pointers(2, None, None, 10)


def test_going_back_two_leaves_no_way_forward_without_naming_it() -> None:
    story = Story().promote(1, 2, 3).back(to=1)
    assert story.pointers.previous is None
    with pytest.raises(Conflict, match=r"nothing to go back to.*once stable and left: 3, 2; name one with --to"):
        rollback_target(story.entries, "demo")
    assert story.back(to=2).pointers.stable == 2


def test_with_no_previous_rollback_is_a_conflict() -> None:
    for story in (Story(), Story().promote(1), Story().promote(1, 2).back()):
        with pytest.raises(Conflict, match="nothing to go back to"):
            plan_rollback(story.entries, "demo", story.pointers, story.now + timedelta(hours=1))


def test_to_goes_only_to_versions_that_were_stable() -> None:
    story = Story().promote(1, 2)
    story.add("rollout_started", 3)
    story.add("aborted", 3)
    with pytest.raises(BadInput, match=r"version 3 was never stable.*\(2, 1\)"):
        rollback_target(story.entries, "demo", 3)
    assert rollback_target(story.entries, "demo", 1) == 1


def test_rollback_during_a_rollout_aborts_it_and_leaves_stable() -> None:
    story = Story().promote(1, 2)
    story.add("rollout_started", 3)
    for asked in (None, 2, 3):
        plan = plan_rollback(story.entries, "demo", story.pointers, story.now, from_version=asked)
        assert (plan.action, plan.version, plan.to) == ("abort", 3, None)
        assert "stable stays 2" in plan.message
    assert "rollback --from 2" in plan_rollback(story.entries, "demo", story.pointers, story.now, 2).message
    first = Story()
    first.add("rollout_started", 1)
    assert plan_rollback(first.entries, "demo", first.pointers, first.now).action == "abort"


def test_rollback_from_a_version_that_left_changes_nothing() -> None:
    story = Story().promote(1, 2, 3).back()
    plan = plan_rollback(story.entries, "demo", story.pointers, story.now, from_version=3)
    assert plan.action == "nothing"
    assert "version 3 is not stable, 2 is" in plan.message


def test_second_operator_within_ten_minutes_changes_nothing() -> None:
    story = Story().promote(1, 2, 3)
    story.add("rolled_back", 3, 2, who="grace")
    for seconds in (0, 1, 599):
        plan = plan_rollback(story.entries, "demo", story.pointers, story.now + timedelta(seconds=seconds))
        assert plan.action == "nothing"
        assert f"grace rolled back from 3 to 2 at {as_text(story.now)}" in plan.message
        assert "mansard rollback --from 2" in plan.message
    later = plan_rollback(story.entries, "demo", story.pointers, story.now + timedelta(minutes=10))
    assert (later.action, later.version, later.to) == ("move", 2, 1)
    named = plan_rollback(story.entries, "demo", story.pointers, story.now, from_version=2)
    assert (named.action, named.to) == ("move", 1)


def test_an_abort_counts_as_a_recent_move_and_a_new_rollout_ends_that() -> None:
    story = Story().promote(1, 2)
    story.add("rollout_started", 3)
    story.add("aborted", 3, who="host")
    plan = plan_rollback(story.entries, "demo", story.pointers, story.now + timedelta(minutes=1))
    assert plan.action == "nothing"
    assert "host aborted the rollout of 3" in plan.message
    story.add("rollout_started", 4)
    assert recent_move(story.entries, "demo", story.now) is None
    assert plan_rollback(story.entries, "demo", story.pointers, story.now).action == "abort"


def test_a_clock_that_jumped_back_far_does_not_block_rollback() -> None:
    story = Story().promote(1, 2, 3).back()
    assert recent_move(story.entries, "demo", story.now - timedelta(minutes=5)) is not None
    assert recent_move(story.entries, "demo", story.now - timedelta(days=1)) is None


def test_rollback_to_the_present_stable_changes_nothing() -> None:
    story = Story().promote(1, 2)
    assert plan_rollback(story.entries, "demo", story.pointers, story.now, to_version=2).action == "nothing"


def test_needs_new_approval_after_abort_and_rollback() -> None:
    story = Story()
    assert needs_new_approval(story.entries, "demo", 1)
    story.add("approved", 1)
    assert not needs_new_approval(story.entries, "demo", 1)
    story.add("rollout_started", 1)
    story.add("aborted", 1)
    assert needs_new_approval(story.entries, "demo", 1)
    story.add("approved", 1, model="other")
    assert needs_new_approval(story.entries, "demo", 1)
    story.add("approved", 1)
    story.promote(1)
    story.add("approved", 2)
    story.promote(2)
    story.back()
    assert needs_new_approval(story.entries, "demo", 2)
    assert not needs_new_approval(story.entries, "demo", 1)


def test_moves_out_of_order_are_refused() -> None:
    story = Story().promote(1)
    story.add("rollout_started", 2)
    new = Entry(99, "demo", "", as_text(START), "", "", {"version": 3, "to": 1}, "", "")
    for kind, message in {
        "rollout_started": "a rollout of version 2 runs",
        "canary_step": "no rollout of version 3 runs",
        "promoted": "no rollout of version 3 runs",
        "aborted": "no rollout of version 3 runs",
        "rolled_back": "a rollout of version 2 runs",
    }.items():
        with pytest.raises(Conflict, match=message):
            after_move(story.entries, replace(new, kind=kind), story.pointers, 9)


COMMANDS = st.lists(
    st.one_of(
        st.tuples(st.just("promote"), st.integers(1, 5)),
        st.tuples(st.just("back"), st.none()),
        st.tuples(st.just("to"), st.integers(1, 5)),
        st.tuples(st.just("abort"), st.integers(1, 5)),
        st.tuples(st.just("other"), st.integers(1, 5)),
    ),
    max_size=40,
)


def play(commands: list[tuple[str, int | None]]) -> Story:
    """Carry out what the rules allow."""
    story = Story()
    for verb, version in commands:
        if verb == "other":
            story.add("promoted", version or 0, model="other")
        elif verb == "back":
            if story.pointers.previous is not None:
                story.back()
        elif version == story.pointers.stable:
            continue
        elif verb == "promote":
            story.promote(version or 0)
        elif verb == "abort":
            story.add("rollout_started", version or 0)
            story.add("aborted", version or 0)
        elif version in once_stable(story.entries, "demo"):
            story.back(to=version)
    return story


@LAW
@given(COMMANDS)
def test_without_named_targets_the_history_is_a_stack(commands: list[tuple[str, int | None]]) -> None:
    story = play([c for c in commands if c[0] != "to"])
    stack: list[int] = []
    for entry in story.entries:
        if entry.model == "demo" and entry.kind == "promoted":
            stack = [v for v in stack if v != entry.version] + [entry.version or 0]
        elif entry.kind == "rolled_back":
            assert stack.pop() == entry.version
    assert story.pointers.stable == (stack[-1] if stack else None)
    assert story.pointers.previous == (stack[-2] if len(stack) > 1 else None)


@LAW
@given(COMMANDS)
def test_previous_is_the_first_that_a_plain_search_finds(commands: list[tuple[str, int | None]]) -> None:
    """The sentence of decision 10 word for word: walk back from the stable's promotion to the first one not undone."""
    story = play(commands)
    own = [e for e in story.entries if e.model == "demo"]
    promotions = [e for e in own if e.kind == "promoted"]
    newest = {e.version: e for e in promotions}
    found = None
    if story.pointers.stable is not None:
        for entry in reversed(promotions):
            is_earlier = entry.sequence < newest[story.pointers.stable].sequence
            was_undone = any(
                e.kind == "rolled_back" and e.version == entry.version and e.sequence > entry.sequence for e in own
            )
            if is_earlier and entry is newest[entry.version] and not was_undone:
                found = entry.version
                break
    assert story.pointers.previous == found == previous_of(story.entries, "demo")
    assert story.pointers.stable == stable_of(story.entries, "demo")


@LAW
@given(COMMANDS)
def test_rolling_back_again_and_again_ends_and_never_visits_twice(commands: list[tuple[str, int | None]]) -> None:
    story = play(commands)
    seen = [story.pointers.stable]
    while story.pointers.previous is not None:
        assert story.pointers.previous not in seen
        story.back()
        seen.append(story.pointers.stable)
    assert len(seen) <= 6


@LAW
@given(COMMANDS)
def test_terms_grow_with_every_move(commands: list[tuple[str, int | None]]) -> None:
    story = play(commands)
    assert story.pointers.term == sum(e.model == "demo" for e in story.entries)
