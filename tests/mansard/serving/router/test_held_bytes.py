"""Whose body goes when memory is short: pure rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mansard.serving.router import held_bytes
from mansard.serving.router.held_bytes import SMALL_BYTES, HeldBody, HeldBytes
from mansard.serving.router.policy import Refused

TOTAL = 30 * SMALL_BYTES


def body_of(bodies: HeldBytes, owner: str, dropped: list[str], name: str = "") -> HeldBody:
    return bodies.body(owner, lambda _: dropped.append(name or owner))


def test_a_halted_body_makes_room_for_its_owners_next(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies, dropped = HeldBytes(TOTAL), list[str]()
    halted, whole = body_of(bodies, "a", dropped, "halted"), body_of(bodies, "a", dropped, "whole")
    whole.add(4 * SMALL_BYTES)
    whole.is_whole = True
    halted.add(5 * SMALL_BYTES)
    with pytest.raises(Refused) as refused:
        body_of(bodies, "a", dropped).add(2 * SMALL_BYTES)
    assert (refused.value.status, dropped) == (429, [])
    body_of(bodies, "b", dropped).add(9 * SMALL_BYTES)
    monkeypatch.setattr(held_bytes, "STALLED_SECONDS", 0.0)
    body_of(bodies, "a", dropped).add(2 * SMALL_BYTES)
    assert dropped == ["halted"]


def test_where_the_total_is_reached_who_holds_most_gives_way() -> None:
    bodies, dropped = HeldBytes(TOTAL), list[str]()
    for _ in range(30):
        body_of(bodies, "a", dropped).add(SMALL_BYTES)  # small ones know no share
    body_of(bodies, "b", dropped).add(SMALL_BYTES)
    assert dropped == ["a"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 8), st.booleans(), st.booleans()), max_size=60))
def test_no_walk_exceeds_the_total_or_forgets_a_byte(steps: list[tuple[str, int, bool, bool]]) -> None:
    bodies, running = HeldBytes(TOTAL), list[HeldBody]()
    for owner, size, is_whole, ends in steps:
        one = bodies.body(owner, lambda _: None)
        running.append(one)
        try:
            one.add(size * SMALL_BYTES)
            one.is_whole = is_whole
        except Refused:
            one.release()
        if ends:
            running.pop(0).release()
        assert sum(body.size for body in running) == bodies._total <= TOTAL
        assert sum(bodies._by_owner.values()) == bodies._total
    for body in running:
        body.release()
    assert (bodies._total, bodies._by_owner, bodies._bodies) == (0, {}, {})
