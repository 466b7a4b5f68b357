"""The journal on both databases: numbers, moves, terms, and that any sequence of commands leaves it whole."""

from collections.abc import Callable, Iterator
from threading import Thread

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mansard.errors import BadInput, Conflict
from mansard.records import Registration
from mansard.release.events import GENESIS, Entry, Pointers
from mansard.release.journal import Journal
from mansard.release.pointer import rollback_target
from tests.mansard.release.journals import Place, filled, plain

Make = Callable[..., Registration]


@pytest.fixture
def journal(place: Place) -> Iterator[Journal]:
    with Journal.open(place) as opened:
        yield opened


def test_equal_registrations_are_one_version_and_others_count_up(journal: Journal, candidate: Make) -> None:
    assert journal.register(candidate("one"), "aa") == 1
    assert journal.register(candidate("two"), None) == 2
    assert journal.register(candidate("one"), "bb") == 1
    assert journal.register(candidate("one", model_name="other"), None) == 1
    assert journal.versions("demo") == [1, 2]
    assert journal.registration("demo", 1) == candidate("one")
    assert (journal.signature("demo", 1), journal.signature("demo", 2)) == ("aa", None)
    assert [e.kind for e in journal.entries()] == ["registered"] * 3
    with pytest.raises(BadInput, match="demo has no version 9; registered are: 1, 2"):
        journal.registration("demo", 9)


def test_find_knows_what_a_spec_made_whatever_the_baseline_was(journal: Journal) -> None:
    journal.register(plain("one"), None)
    journal.register(plain("two"), None)
    one = plain("one", baseline_version=2, verdict="fail")
    assert journal.find("demo", one.artifact, one.spec_digest) == 1
    assert journal.find("other", one.artifact, one.spec_digest) is None
    assert journal.find("demo", one.artifact, "0" * 64) is None


def test_a_version_judged_again_has_the_new_verdict(journal: Journal) -> None:
    journal.register(plain("one"), "aa")
    again = plain("one", verdict="fail", baseline_version=4, verdict_record="e" * 64, item_records=(("b", "f" * 64),))
    journal.judge(1, again, "bb", "ada", "the baseline moved")
    assert journal.registration("demo", 1) == again
    assert journal.signature("demo", 1) == "bb"
    assert journal.register(plain("one"), None) == 1
    with pytest.raises(BadInput, match="may not change the candidate"):
        journal.judge(1, plain("two"), None, "ada", "")
    with pytest.raises(BadInput, match="no version 2"):
        journal.judge(2, again, None, "ada", "")
    journal.verify()


def test_a_version_judged_again_was_measured_beside_the_new_baseline(journal: Journal) -> None:
    made = ("quantize", "7" * 64, "8" * 64)
    journal.register(plain("one", stages=(made, ("cost", "1" * 64, "2" * 64))), "aa")
    again = plain("one", baseline_version=4, stages=(made, ("cost", "3" * 64, "4" * 64)))
    journal.judge(1, again, "bb", "ada", "the baseline moved")
    assert journal.registration("demo", 1) == again
    with pytest.raises(BadInput, match="may not change the candidate"):
        journal.judge(1, plain("one", stages=(("quantize", "9" * 64, "8" * 64),)), None, "ada", "")


def test_pointers_follow_the_moves_and_terms_grow(place: Place) -> None:
    with filled(place) as journal:
        assert journal.pointers("demo") == Pointers(stable=1, canary=None, previous=None, term=9)
        assert journal.term() == 9
        assert journal.pointers("other") == Pointers()
        terms = [e.body["after"]["term"] for e in journal.entries("demo") if "after" in e.body]
        assert terms == list(range(1, 10))
        step = journal.entries("demo", kinds=("canary_step",))[0]
        assert step.body == {
            "version": 1,
            "weight_percent": 50,
            "facts": {"step": 1, "steps": 2},
            "before": {"stable": None, "canary": 1, "previous": None, "term": 1},
            "after": {"stable": None, "canary": 1, "previous": None, "term": 2},
        }
        journal.verify()


def test_terms_are_global_and_pointers_are_per_model(journal: Journal) -> None:
    journal.register(plain("one"), None)
    journal.register(plain("one", model_name="other"), None)
    assert journal.start_rollout("demo", 1, "ada", "", Pointers()) == 1
    assert journal.start_rollout("other", 1, "ada", "", Pointers()) == 2
    assert journal.promote("demo", 1, "ada", "", Pointers(canary=1, term=1)) == 3
    assert journal.pointers("demo") == Pointers(stable=1, term=3)
    assert journal.pointers("other") == Pointers(canary=1, term=2)
    journal.verify()


def test_a_move_from_other_pointers_than_expected_changes_nothing(journal: Journal) -> None:
    journal.register(plain("one"), None)
    journal.register(plain("two"), None)
    journal.start_rollout("demo", 1, "ada", "", Pointers())
    before = journal.entries()
    late = Pointers(canary=1, term=0)
    for move in (journal.start_rollout, journal.promote, journal.abort):
        with pytest.raises(Conflict, match="the pointers moved meanwhile"):
            move("demo", 1, "ada", "", late)
    with pytest.raises(Conflict, match="the pointers moved meanwhile"):
        journal.step("demo", 1, 5, "ada", "", late)
    assert journal.entries() == before
    assert journal.term() == 1


def test_one_rollout_per_model_and_only_of_registered_versions(journal: Journal) -> None:
    journal.register(plain("one"), None)
    journal.register(plain("two"), None)
    with pytest.raises(BadInput, match="no version 7"):
        journal.start_rollout("demo", 7, "ada", "", Pointers())
    journal.start_rollout("demo", 1, "ada", "", Pointers())
    with pytest.raises(Conflict, match="a rollout of version 1 runs"):
        journal.start_rollout("demo", 2, "ada", "", journal.pointers("demo"))
    with pytest.raises(Conflict, match="no rollout of version 2 runs"):
        journal.promote("demo", 2, "ada", "", journal.pointers("demo"))
    journal.promote("demo", 1, "ada", "", journal.pointers("demo"))
    with pytest.raises(Conflict, match="stable already"):
        journal.start_rollout("demo", 1, "ada", "", journal.pointers("demo"))
    with pytest.raises(BadInput, match="never stable"):
        journal.rollback("demo", 2, "ada", "", journal.pointers("demo"))
    journal.verify()


def test_entries_that_change_more_have_their_own_verbs(journal: Journal) -> None:
    for kind in ("promoted", "registered", "judged", "rolled_back"):
        with pytest.raises(ValueError, match="its own verb"):
            journal.append("demo", kind, "ada", "", {})
    for value in (float("nan"), object(), {1: 0, "b": 0}):
        with pytest.raises(BadInput, match="not JSON"):
            journal.append("demo", "approved", "ada", "", {"value": value})
    with pytest.raises(BadInput, match="not JSON"):
        journal.append("demo", "approved", "ada", "\udcff", {})
    journal.append("demo", "approved", "ada", "", {"a": {2: 1, 10: (1, 2)}, "b": "ä"})
    journal.verify()
    assert journal.entries()[0].body == {"a": {"2": 1, "10": [1, 2]}, "b": "ä"}


def test_a_journal_opened_again_goes_on(place: Place) -> None:
    with filled(place) as journal:
        entries = journal.entries()
    with Journal.open(place) as again:
        assert again.entries() == entries
        assert again.tip() == entries[-1]
        assert again.entries(after=3) == entries[3:]
        assert again.register(plain("four"), None) == 4
        assert again.tip().previous_digest == entries[-1].digest  # type: ignore[union-attr]
        again.verify()


def test_threads_share_one_journal(journal: Journal) -> None:
    def register(start: int) -> None:
        for number in range(start, start + 10):
            journal.register(plain(f"number {number}"), None)

    threads = [Thread(target=register, args=(start,)) for start in (0, 5, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journal.versions("demo") == list(range(1, 21))
    journal.verify()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(["start", "step", "promote", "abort", "back"]), st.integers(1, 4))))
def test_any_sequence_of_commands_leaves_a_journal_that_verifies(
    new_place: Callable[[], Place], commands: list[tuple[str, int]]
) -> None:
    with Journal.open(new_place()) as journal:
        for number in range(4):
            journal.register(plain(f"number {number}"), None)
        for verb, version in commands:
            pointers, entries = journal.pointers("demo"), journal.entries()
            try:
                if verb == "start":
                    term = journal.start_rollout("demo", version, "ada", "", pointers)
                elif verb == "step":
                    term = journal.step("demo", version, 10, "ada", "", pointers)
                elif verb == "promote":
                    term = journal.promote("demo", version, "ada", "", pointers)
                elif verb == "abort":
                    term = journal.abort("demo", version, "ada", "", pointers)
                else:
                    to = rollback_target(entries, "demo")
                    term = journal.rollback("demo", to, "ada", "", pointers)
            except Conflict:
                assert journal.entries() == entries
                assert journal.pointers("demo") == pointers
            else:
                assert term == journal.term() == journal.pointers("demo").term == pointers.term + 1
        journal.verify()


def test_the_first_entry_follows_the_genesis_digest(journal: Journal) -> None:
    journal.register(plain(), None)
    first: Entry = journal.entries()[0]
    assert (first.sequence, first.previous_digest) == (1, GENESIS)
    assert first.digest == first.computed_digest()
