"""The host process with a stand-in for vLLM: versions are released, and its own end loses nothing."""

import os
import signal
from typing import Any

import pytest

from mansard.errors import BadInput, Conflict, NotAllowed
from mansard.release.journal import Journal
from tests.mansard.serving.host.served_place import (
    ONE_STEP,
    SLOW_RELEASE,
    in_service,
    release_to_all,
    slow_canary_under_traffic,
)

pytestmark = pytest.mark.slow


def test_a_first_version_is_released_and_answers_through_the_router(place: Any) -> None:
    place.start_host()
    place.start_router()
    version = place.register()
    with pytest.raises(NotAllowed, match="not approved"):
        place.start_rollout(version)
    assert place.release(version)["state"] == "promoted"
    place.wait_for("an answer of version 1", lambda: place.ask() == (200, "1"))
    with pytest.raises(Conflict, match="nothing to go back to"):
        place.roll_back()


def test_a_canary_walks_to_all_of_the_traffic_and_back_without_a_lost_request(place: Any, traffic: Any) -> None:
    in_service(place)
    second = place.register(voice="b")
    assert {place.engine_of(v)["cores"] for v in (1, 2)} == {"0", "1"}
    first_pid = place.engine_of(1)["pid"]
    second_pid = place.engine_of(2)["pid"]
    traffic.start()
    place.approve(second)
    place.start_rollout(second)
    with pytest.raises(Conflict, match="a rollout of version 2 runs"):
        place.start_rollout(second)
    ended = place.wait_for_end()
    assert ended["state"] == "promoted", ended["reason"]
    status = place.status()["models"]["demo"]
    assert (status["stable"], status["canary"], status["previous"]) == (2, None, 1)
    place.wait_for("version 2 everywhere", lambda: {place.ask(f"u{i}")[1] for i in range(20)} == {"2"})
    back = place.roll_back()
    assert (back["changed"], back["stable"], back["warnings"], back["started_seconds"]) == (True, 1, [], 0.0)
    assert {place.ask(f"u{i}") for i in range(20)} == {(200, "1")}
    assert place.roll_back()["changed"] is False
    traffic.stop()
    assert set(traffic.statuses) == {200}
    assert set(traffic.versions) == {"1", "2"}
    assert (place.engine_of(1)["pid"], place.engine_of(2)["pid"]) == (first_pid, second_pid)
    with Journal.open(place.site.journal) as journal:
        journal.verify()
        weights = [e.body["weight_percent"] for e in journal.entries("demo", kinds=("canary_step",))]
    assert weights == [50, 100]


def test_a_release_for_which_too_few_users_ask_is_refused_with_both_numbers(place: Any) -> None:
    in_service(place)
    second = place.register(SLOW_RELEASE, voice="b")
    place.approve(second)
    for number in range(1, 300):
        place.ask("one-application" if number % 10 else f"user-{number}")
    with pytest.raises(Conflict, match=r"step 1 of 1 \(50 %\): 31 users asked lately.*30 on each side.*about 60 users"):
        place.start_rollout(second)
    told = place.client.call("GET", f"/rollouts/demo/users/{second}")
    (step,) = told["steps"]
    assert (told["seen"], told["needed_on_each_side"], step["canary"] + step["stable"]) == (31, 30, 31)
    with Journal.open(place.site.journal) as journal:
        assert journal.entries("demo")[-1].kind == "approved"
    assert place.split().canary is None
    place.ask_as_users()
    place.start_rollout(second)
    with Journal.open(place.site.journal) as journal:
        (started,) = [e for e in journal.entries("demo", kinds=("rollout_started",)) if e.version == second]
    assert started.body["facts"]["users"]["seen"] == 151


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_rollout_goes_on_with_the_next_host_and_no_request_is_lost(
    place: Any, traffic: Any, number: signal.Signals
) -> None:
    slow_canary_under_traffic(place, traffic)
    engines = {v: place.engine_of(v)["pid"] for v in (1, 2)}
    place.end_host(number)
    place.start_host()
    place.wait_for("the step again", lambda: place.rollout()["state"] == "canary")
    assert (place.rollout()["attempt"], place.rollout()["weight_percent"], place.rollout()["who"]) == (2, 50, "ada")
    assert (place.split().stable, place.split().canary) == (1, 2)
    assert {v: place.engine_of(v)["pid"] for v in (1, 2)} == engines
    seen = len(traffic.versions)
    place.wait_for("traffic on the canary again", lambda: "2" in traffic.versions[seen:])
    traffic.stop()
    assert set(traffic.statuses) == {200}
    with Journal.open(place.site.journal) as journal:
        assert [e.kind for e in journal.entries("demo")][-2:] == ["canary_step", "canary_step"]


def test_a_release_without_a_measured_latency_is_refused(place: Any) -> None:
    in_service(place)
    second = place.register(voice="b", ratios=None)
    place.approve(second)
    with pytest.raises(BadInput, match=r"measured no latency beside stable.*mansard gate 2"):
        place.start_rollout(second)
    assert place.status()["models"]["demo"]["canary"] is None


def test_the_engines_own_means_of_each_step_are_in_the_journal(place: Any, traffic: Any) -> None:
    in_service(place)
    traffic.start()
    assert place.release(place.register(voice="b"))["state"] == "promoted"
    traffic.stop()
    with Journal.open(place.site.journal) as journal:
        promoted = journal.moves("demo")[-1]
    told = promoted.body["facts"]["observations"]["engines"]
    assert {"first_token", "request", "output"} <= told["canary"].keys()
    assert "the engines' own means: first_token" in promoted.why


def test_versions_that_left_the_rollback_window_are_retired(place: Any) -> None:
    in_service(place)
    for voice in "bcde":
        version = place.register(ONE_STEP, voice=voice)
        assert release_to_all(place, version) == "promoted"
    # The window holds two beside stable, and one more engine may stay warm.
    place.wait_for("version 1's end", lambda: len(place.status()["engines"]) == 4)
    kept = {engine["artifact"] for engine in place.status()["engines"]}
    assert {place.artifact(voice=voice) for voice in "cde"} <= kept
    assert place.artifact() not in kept


def test_a_dead_stable_engine_is_started_again(place: Any) -> None:
    in_service(place)
    old = place.engine_of(1)["pid"]
    os.kill(old, signal.SIGKILL)
    place.wait_for("another process", lambda: [e for e in place.status()["engines"] if e["pid"] not in (0, old)])
    place.wait_for("answers again", lambda: place.ask() == (200, "1"))


def test_the_split_follows_a_pointer_that_another_process_moved(place: Any) -> None:
    in_service(place)
    assert release_to_all(place, place.register(ONE_STEP, voice="b")) == "promoted"
    with Journal.open(place.site.journal) as journal:
        journal.rollback("demo", 1, "otto", "host hung", journal.pointers("demo"))
    place.wait_for("the split to follow", lambda: place.split().stable == 1)
    place.wait_for("answers of version 1", lambda: place.ask() == (200, "1"))


def test_a_damaged_split_file_is_written_again_from_the_journal(place: Any) -> None:
    in_service(place)
    place.end_host(signal.SIGKILL)
    place.site.split_file.write_text('{"format": 1, "term"')
    assert place.ask() == (200, "1")
    place.start_host()
    place.wait_for("the split", lambda: place.split().versions[1].endpoint)
    assert place.ask() == (200, "1")


def test_a_host_that_is_stopped_in_a_rollout_ends_it(place: Any) -> None:
    in_service(place)
    place.ask_as_users()
    second = place.register(SLOW_RELEASE, voice="b")
    place.approve(second)
    place.start_rollout(second)
    place.wait_for("the canary", lambda: place.split().canary == 2)
    place.end_host(signal.SIGTERM)
    assert (place.split().stable, place.split().canary) == (1, None)
    with Journal.open(place.site.journal) as journal:
        assert journal.pointers("demo").canary is None
        assert journal.moves("demo")[-1].why == "aborted: host stopped"
