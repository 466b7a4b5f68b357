"""The host process with a stand-in for vLLM: versions released and rolled back."""

import itertools
import os
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import BadInput, Conflict, NotAllowed
from mansard.release.journal import Journal
from mansard.serving.client import router_observations
from mansard.serving.process import identify

pytestmark = pytest.mark.slow


def wait_for(place: Any, what: str, found: Any) -> Any:
    """conftest's `wait_for`, which a test module cannot import."""
    return place.wait_for(what, found)


def test_a_first_version_is_released_and_answers_through_the_router(place: Any) -> None:
    place.start_host()
    place.start_router()
    version = place.register()
    with pytest.raises(NotAllowed, match="not approved"):
        place.start_rollout(version)
    assert place.release(version)["state"] == "promoted"
    wait_for(place, "an answer of version 1", lambda: place.ask() == (200, "1"))
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
    wait_for(place, "version 2 everywhere", lambda: {place.ask(f"u{i}")[1] for i in range(20)} == {"2"})
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


def test_killing_the_canarys_engine_aborts_at_once_and_users_see_nothing(place: Any, traffic: Any) -> None:
    in_service(place)
    second = place.register(SLOW_RELEASE, voice="b")
    traffic.start()
    place.approve(second)
    place.start_rollout(second)
    wait_for(place, "traffic on the canary", lambda: "2" in traffic.versions)
    os.kill(place.engine_of(2)["pid"], signal.SIGKILL)
    ended = place.wait_for_end()
    assert ended["state"] == "aborted"
    assert "died" in ended["reason"] or "consecutive" in ended["reason"]
    assert (place.split().stable, place.split().canary) == (1, None)
    traffic.stop()
    assert traffic.statuses.count(200) >= len(traffic.statuses) - 2  # a stream that the dead engine had begun
    with pytest.raises(NotAllowed, match="aborted"):
        place.start_rollout(second)


def test_a_canary_that_answers_500_is_aborted_and_its_users_are_rescued(place: Any, traffic: Any) -> None:
    in_service(place)
    # Its own fingerprint, its warm requests and its first users get answers, then it fails.
    second = place.register(SLOW_RELEASE, voice="b", fail_completions=True, fail_after=12)
    traffic.start()
    ended = place.release(second)
    assert ended["state"] == "aborted"
    traffic.stop()
    assert set(traffic.statuses) == {200}


def test_another_fingerprint_aborts_before_any_traffic(place: Any, traffic: Any) -> None:
    in_service(place)
    with Journal.open(place.site.journal) as journal:
        of_first = journal.registration("demo", 1).fingerprint
    second = place.register(SLOW_RELEASE, fingerprint=of_first, voice="b")
    traffic.start()
    ended = place.release(second)
    traffic.stop()
    assert (ended["state"], ended["weight_percent"]) == ("aborted", 0)
    assert "fingerprint" in ended["reason"]
    assert set(traffic.versions) == {"1"}


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


def test_low_traffic_ends_inconclusive(place: Any) -> None:
    in_service(place)
    place.ask_as_users()
    steps = [{"weight_percent": 50, "bake_seconds": 0, "min_requests": 5, "deadline_seconds": 2}]
    ended = place.release(place.register({**SLOW_RELEASE, "steps": steps}, voice="b"))
    assert (ended["state"], place.split().stable) == ("aborted", 1)
    assert "inconclusive" in ended["reason"]


def test_rollback_ends_a_rollout_and_leaves_stable(place: Any, traffic: Any) -> None:
    in_service(place)
    second = place.register(SLOW_RELEASE, voice="b")
    traffic.start()
    place.approve(second)
    place.start_rollout(second)
    wait_for(place, "traffic on the canary", lambda: "2" in traffic.versions)
    done = place.roll_back()
    assert (done["changed"], done["stable"], done["canary"]) == (True, 1, None)
    assert place.rollout()["state"] == "aborted"
    assert {place.ask(f"u{i}") for i in range(20)} == {(200, "1")}
    assert place.roll_back()["changed"] is False
    traffic.stop()
    assert set(traffic.statuses) == {200}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_rollout_goes_on_with_the_next_host_and_no_request_is_lost(
    place: Any, traffic: Any, number: signal.Signals
) -> None:
    in_service(place)
    second = place.register(SLOW_RELEASE, voice="b")
    traffic.start()
    place.approve(second)
    place.start_rollout(second)
    wait_for(place, "traffic on the canary", lambda: "2" in traffic.versions)
    engines = {v: place.engine_of(v)["pid"] for v in (1, 2)}
    place.end_host(number)
    place.start_host()
    wait_for(place, "the step again", lambda: place.rollout()["state"] == "canary")
    assert (place.rollout()["attempt"], place.rollout()["weight_percent"], place.rollout()["who"]) == (2, 50, "ada")
    assert (place.split().stable, place.split().canary) == (1, 2)
    assert {v: place.engine_of(v)["pid"] for v in (1, 2)} == engines
    seen = len(traffic.versions)
    wait_for(place, "traffic on the canary again", lambda: "2" in traffic.versions[seen:])
    traffic.stop()
    assert set(traffic.statuses) == {200}
    with Journal.open(place.site.journal) as journal:
        assert [e.kind for e in journal.entries("demo")][-2:] == ["canary_step", "canary_step"]


def test_a_canary_that_died_with_its_host_is_aborted_by_the_next_one(place: Any, traffic: Any) -> None:
    in_service(place)
    second = place.register(SLOW_RELEASE, voice="b", start_once=str(place.home / "started"))
    traffic.start()
    place.approve(second)
    place.start_rollout(second)
    wait_for(place, "traffic on the canary", lambda: "2" in traffic.versions)
    pid = place.engine_of(2)["pid"]
    place.end_host(signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    place.start_host()
    ended = place.wait_for_end()
    assert ended["state"] == "aborted"
    assert (place.split().stable, place.split().canary) == (1, None)
    traffic.stop()
    assert traffic.statuses.count(200) >= len(traffic.statuses) - 2  # streams that the killed engine had begun


def test_a_release_without_a_measured_latency_is_refused(place: Any) -> None:
    in_service(place)
    second = place.register(voice="b", ratios=None)
    place.approve(second)
    with pytest.raises(BadInput, match=r"measured no latency beside stable.*mansard gate 2"):
        place.start_rollout(second)
    assert place.status()["models"]["demo"]["canary"] is None


def test_a_canary_slower_than_evaluation_measured_is_aborted(place: Any, traffic: Any) -> None:
    in_service(place)
    limits = {**SLOW_RELEASE, "latency_tolerance": 3.0}
    second = place.register(limits, voice="b", seconds_per_token=0.2)
    traffic.start(4)
    ended = place.release(second)
    traffic.stop()
    assert ended["state"] == "aborted"
    assert "limit 3.00x" in ended["reason"]
    assert set(traffic.statuses) == {200}


def test_a_canary_that_hangs_is_aborted_by_the_age_of_what_it_never_answers(place: Any, traffic: Any) -> None:
    in_service(place)
    second = place.register({**SLOW_RELEASE, "latency_tolerance": 5.0}, voice="b", hang_after=12)
    traffic.start(60)
    ended = place.release(second)
    assert ended["state"] == "aborted"
    assert "request: " in ended["reason"] or "probe failed" in ended["reason"]
    traffic.stop()  # who hung was rescued by stable when the engine was ended
    assert traffic.statuses.count(200) >= len(traffic.statuses) - 60  # streams that had begun end with an error event
    wait_for(place, "the bad engine's end", lambda: len(place.status()["engines"]) == 1)


def test_a_canary_that_hangs_before_few_users_is_aborted_by_its_engines_own_account(place: Any, traffic: Any) -> None:
    place.start_host_script(Path(__file__).parent / "host_impatient.py", 5)
    place.start_router()
    place.release(place.register())
    second = place.register(SLOW_RELEASE, voice="b", hang_after=12)
    engine = place.engine_of(second)["pid"]
    traffic.start(2)
    ended = place.release(second)
    os.kill(engine, signal.SIGKILL)
    assert ended["state"] == "aborted"
    assert "its engine hangs: requests in flight, and no token, prompt or memory moved for" in ended["reason"]


def test_guard_prompts_that_a_hung_engine_never_answers_do_not_hold_the_host(place: Any) -> None:
    in_service(place)
    place.ask_as_users()
    second = place.register(SLOW_RELEASE, voice="b", hang_after=8)
    engine = place.engine_of(second)
    place.approve(second)
    place.start_rollout(second)

    def hangs() -> bool:
        with urllib.request.urlopen(f"{engine['endpoint']}/metrics") as answer:
            lines = answer.read().decode().split("\n")
        return "fake:completions 9.0" in lines

    wait_for(place, "a guard prompt that is never answered", hangs)
    place.end_host(signal.SIGHUP)  # within its deadline: the question's own is longer
    os.kill(engine["pid"], signal.SIGKILL)


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


def test_a_canary_that_begins_to_babble_is_aborted(place: Any, traffic: Any) -> None:
    in_service(place)
    second = place.register(SLOW_RELEASE, voice="b", babble_after=60)
    traffic.start()
    ended = place.release(second)
    traffic.stop()
    assert ended["state"] == "aborted"
    assert "answers to the guard prompts changed" in ended["reason"]


def test_versions_that_left_the_rollback_window_are_retired(place: Any) -> None:
    in_service(place)
    for voice in "bcde":
        version = place.register(ONE_STEP, voice=voice)
        assert release_to_all(place, version) == "promoted"
    # The window holds two beside stable, and one more engine may stay warm.
    wait_for(place, "version 1's end", lambda: len(place.status()["engines"]) == 4)
    kept = {engine["artifact"] for engine in place.status()["engines"]}
    assert {place.artifact(voice=voice) for voice in "cde"} <= kept
    assert place.artifact() not in kept


def test_a_dead_stable_engine_is_started_again(place: Any) -> None:
    in_service(place)
    old = place.engine_of(1)["pid"]
    os.kill(old, signal.SIGKILL)
    wait_for(place, "another process", lambda: [e for e in place.status()["engines"] if e["pid"] not in (0, old)])
    wait_for(place, "answers again", lambda: place.ask() == (200, "1"))


def test_rollback_starts_a_cold_previous_first(place: Any) -> None:
    in_service(place)
    assert release_to_all(place, place.register(ONE_STEP, voice="b")) == "promoted"
    old = place.engine_of(1)["pid"]
    os.kill(old, signal.SIGKILL)
    wait_for(place, "its death to be seen", lambda: place.split().versions[1].endpoint is None)
    back = place.roll_back()
    assert (back["changed"], back["stable"], back["warnings"]) == (True, 1, [])
    assert place.engine_of(1)["pid"] != old
    assert place.ask() == (200, "1")


def test_a_hard_rollback_does_not_wait_for_a_cold_previous(place: Any) -> None:
    in_service(place)
    assert release_to_all(place, place.register(ONE_STEP, voice="b")) == "promoted"
    os.kill(place.engine_of(1)["pid"], signal.SIGKILL)
    wait_for(place, "its death to be seen", lambda: place.split().versions[1].endpoint is None)
    back = place.roll_back(hard=True)
    assert (back["changed"], back["stable"], back["started_seconds"]) == (True, 1, 0.0)
    wait_for(place, "answers of version 1", lambda: place.ask() == (200, "1"))


def test_a_hard_rollback_ends_running_streams_with_an_error_event(place: Any) -> None:
    in_service(place)
    assert release_to_all(place, place.register(ONE_STEP, voice="b", seconds_per_token=0.01)) == "promoted"
    with ThreadPoolExecutor() as threads:
        stream = threads.submit(place.ask_long)
        wait_for(place, "the stream", lambda: router_in_flight(place, "2"))
        old = place.engine_of(2)["pid"]
        back = place.roll_back(hard=True)
        status, version, text = stream.result(60)
    assert (back["stable"], back["warnings"]) == (1, [])
    assert (status, version) == (599, "2")  # 599: not whole
    assert b'"error"' in text
    assert b"version 2 broke off this answer" in text
    wait_for(place, "the engine's end", lambda: identify(old) is None)
    assert place.ask() == (200, "1")


def test_a_graceful_rollback_lets_running_streams_end(place: Any) -> None:
    in_service(place)
    assert release_to_all(place, place.register(ONE_STEP, voice="b", seconds_per_token=0.01)) == "promoted"
    with ThreadPoolExecutor() as threads:
        stream = threads.submit(place.ask_long)
        wait_for(place, "the stream", lambda: router_in_flight(place, "2"))
        assert place.roll_back()["stable"] == 1
        assert place.ask() == (200, "1")
        status, version, _ = stream.result(60)
    assert (status, version) == (200, "2")


def test_a_rollback_to_a_version_that_answers_otherwise_now_warns_and_is_made(place: Any) -> None:
    in_service(place, babble_once=str(place.home / "begun"))
    assert release_to_all(place, place.register(ONE_STEP, voice="b")) == "promoted"
    os.kill(place.engine_of(1)["pid"], signal.SIGKILL)
    wait_for(place, "its death to be seen", lambda: place.split().versions[1].endpoint is None)
    back = place.roll_back()
    assert back["stable"] == 1
    assert any("fingerprint" in warning for warning in back["warnings"]), back


def test_the_split_follows_a_pointer_that_another_process_moved(place: Any) -> None:
    in_service(place)
    assert release_to_all(place, place.register(ONE_STEP, voice="b")) == "promoted"
    with Journal.open(place.site.journal) as journal:
        journal.rollback("demo", 1, "otto", "host hung", journal.pointers("demo"))
    wait_for(place, "the split to follow", lambda: place.split().stable == 1)
    wait_for(place, "answers of version 1", lambda: place.ask() == (200, "1"))


def test_a_damaged_split_file_is_written_again_from_the_journal(place: Any) -> None:
    in_service(place)
    place.end_host(signal.SIGKILL)
    place.site.split_file.write_text('{"format": 1, "term"')
    assert place.ask() == (200, "1")
    place.start_host()
    wait_for(place, "the split", lambda: place.split().versions[1].endpoint)
    assert place.ask() == (200, "1")


def test_a_host_that_is_stopped_in_a_rollout_ends_it(place: Any) -> None:
    in_service(place)
    place.ask_as_users()
    second = place.register(SLOW_RELEASE, voice="b")
    place.approve(second)
    place.start_rollout(second)
    wait_for(place, "the canary", lambda: place.split().canary == 2)
    place.end_host(signal.SIGTERM)
    assert (place.split().stable, place.split().canary) == (1, None)
    with Journal.open(place.site.journal) as journal:
        assert journal.pointers("demo").canary is None
        assert journal.moves("demo")[-1].why == "aborted: host stopped"


LIMITS = {"max_error_excess": 0.02, "latency_tolerance": 50.0, "output_tolerance": 2.0}
SLOW_RELEASE = {
    "steps": [{"weight_percent": 50, "bake_seconds": 600, "min_requests": 10, "deadline_seconds": 1200}],
    **LIMITS,
}
ONE_STEP = {
    "steps": [{"weight_percent": 100, "bake_seconds": 0, "min_requests": 1, "deadline_seconds": 90}],
    **LIMITS,
}


def release_to_all(place: Any, version: int) -> str:
    """A release in one step with just enough traffic: 40 users before and after; how it ended."""
    users = itertools.cycle(f"user-{number}" for number in range(40))
    for _ in range(40):
        place.ask(next(users))
    place.approve(version)
    place.start_rollout(version)
    ended = wait_for(
        place,
        "the end",
        lambda: place.ask(next(users)) and (s := place.rollout()["state"]) in ("promoted", "aborted") and s,
    )
    return str(ended)


def router_in_flight(place: Any, version: str) -> int:
    """What the router has under way at a version."""
    for seen in router_observations(place.site):
        return int(seen["models"]["demo"]["versions"].get(version, {"in_flight": 0})["in_flight"])
    return 0


def in_service(place: Any, **behaviour: Any) -> None:
    """Host, router, and version 1 stable and answering."""
    place.start_host()
    place.start_router()
    assert place.release(place.register(**behaviour))["state"] == "promoted"
    wait_for(place, "an answer of version 1", lambda: place.ask() == (200, "1"))
