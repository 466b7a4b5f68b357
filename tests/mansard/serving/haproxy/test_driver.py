"""A real HAProxy behind the same split file, the same admin socket and the same laws as the router workers."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from mansard.errors import MansardError
from mansard.serving.haproxy.runtime import Runtime
from mansard.serving.split import Split, bucket_of, renewed, with_canary, with_stable, without_canary, write_split
from tests.free_ports import free_port

HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(HAPROXY is None, reason="left out: HAProxy is not installed (apt-get install haproxy)"),
]
STREAM = b'{"model": "tiny", "prompt": "x", "stream": true}'


@pytest.fixture
def haproxy(make_rig: Callable[..., Any]) -> Callable[..., contextlib.AbstractContextManager[Any]]:
    """haproxy("--argument") is a rig whose worker is the driver."""

    def make(*arguments: str) -> contextlib.AbstractContextManager[Any]:
        port = free_port()
        lines = "router: {plane: haproxy, show_version: always}\n"
        return ended_with(make_rig(*arguments, site_lines=lines, module="haproxy.driver", port=port))

    return make


@contextlib.contextmanager
def ended_with(making: contextlib.AbstractContextManager[Any]) -> Any:
    """HAProxy outlives its driver on purpose; here it ends with the test."""
    with making as rig:
        try:
            yield rig
        finally:
            with contextlib.suppress(MansardError, ProcessLookupError):
                os.kill(pid_of(rig), signal.SIGKILL)


def pid_of(rig: Any) -> int:
    return Runtime(rig.home / "run/haproxy.sock", rig.home, rig.home).pid()


def versions(rig: Any, num_users: int = 150) -> dict[int, str | None]:
    return {i: rig.call(x_user_id=f"u{i}").version for i in range(num_users)}


def test_raising_the_weight_only_adds_users_and_shares_follow_it(haproxy: Callable[..., Any]) -> None:
    with haproxy() as rig:
        canary, begun = [], rig.records()["next"]
        for percent in (0, 5, 25, 50, 100):
            rig.write(percent)
            canary.append({i for i, version in versions(rig).items() if version == "2"})
        assert canary[0] < canary[1] < canary[2] < canary[3] < canary[4] == set(range(150))
        assert 15 <= len(canary[2]) <= 65
        assert 45 <= len(canary[3]) <= 105
        rig.write(25)  # the analysis knows each user's side from the record's key
        number = begun + 5 * 150
        rig.wait_until(lambda: rig.records()["next"] == number, "the lines of what was asked so far")
        versions(rig)
        rig.wait_until(lambda: rig.records()["next"] == number + 150, "the log's lines")
        answer = rig.records(number)
        records = [dict(zip(answer["fields"], record, strict=True)) for record in answer["records"]]
        assert all((bucket_of(int(r["key"], 16), "") < 2500) == (r["version"] == 2) for r in records)


def test_under_a_rollouts_salt_users_go_where_the_router_sends_them(haproxy: Callable[..., Any]) -> None:
    salt = "0123456789abcdef" * 2
    with haproxy() as rig:
        split = with_stable(Split(), "tiny", 1, rig.one.endpoint, "tiny", 50)
        rig.put(with_canary(split, "tiny", 2, rig.two.endpoint, "tiny", 50, 50, salt))
        versions(rig, 60)
        rig.wait_until(lambda: len(rig.records()["records"]) == 60, "60 records")
        records = [dict(zip(rig.records()["fields"], row, strict=True)) for row in rig.records()["records"]]
        assert all((bucket_of(int(r["key"], 16), salt) < 5000) == (r["version"] == 2) for r in records)
        assert {r["version"] for r in records} == {1, 2}
        assert len({r["tenant"] for r in records}) == 1


def test_pins_paths_and_methods_are_as_in_the_router(haproxy: Callable[..., Any]) -> None:
    with haproxy() as rig:
        rig.write(0)
        assert rig.call(x_mansard_version="2").text == "two"
        assert rig.call(x_mansard_version="1").text == "one"
        assert rig.call(x_mansard_version="nine").status == 404
        before = rig.one.seen()["requests"]
        for path in ("/pooling", "/update_weights", "//v1/completions", "/v1/%63ompletions", "/v1/models/", "/metrics"):
            assert rig.call(path).status == 404
        assert rig.call("/v1/completions", method="GET").status == 405
        with rig.connect() as client:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9000000\r\n\r\n"
            client.sendall(head + b"x" * 70_000)  # HAProxy reads a body first, up to its buffer
            assert client.recv(100).startswith(b"HTTP/1.1 413")
        assert rig.one.seen()["requests"] == before
        assert rig.call("/v1/completions?a=b", authorization="Bearer secret", cookie="a=b").status == 200
        assert not {"authorization", "cookie"} & rig.one.seen()["headers"].keys()
        assert rig.one.seen()["paths"][-1] == "POST /v1/completions"
        assert rig.call("/health", method="GET").status == 200


@pytest.mark.parametrize("fail", ["refuse", "error500"])
def test_a_failing_canary_is_rescued_by_stable_and_pays_for_it(haproxy: Callable[..., Any], fail: str) -> None:
    with haproxy() as rig:
        rig.write(100)
        number = rig.records()["next"]
        rig.two.behave(fail=fail)
        reply = rig.call()
        assert (reply.status, reply.version) == (200, "1")
        rig.wait_until(lambda: rig.counts(2)["errors"] == 1, "the log's line")
        assert rig.counts(2)["rescues"] == 1
        answer = rig.records(number)
        records = [dict(zip(answer["fields"], record, strict=True)) for record in answer["records"]]
        assert [(r["version"], r["outcome"]) for r in records] == [(2, "error"), (1, "ok")]
        assert len({r["key"] for r in records}) == 1


def test_a_running_stream_outlives_the_canary_and_an_older_term_is_ignored(haproxy: Callable[..., Any]) -> None:
    with haproxy() as rig:
        split = rig.write(100)
        rig.two.behave(fail="hang-after-two")
        with rig.stream() as answer:
            assert b'"two"' in answer.readline()
            rig.put(without_canary(split, "tiny", split.term + 1))
            assert set(versions(rig, 20).values()) == {"1"}
            rig.two.behave(fail="none")
            assert answer.read().endswith(b"data: [DONE]\n\n")
        (rig.home / "split.json").unlink()
        write_split(rig.home / "split.json", with_stable(Split(), "tiny", 2, rig.two.endpoint, "tiny", split.term))
        rig.wait_until(lambda: "older" in (rig.seen()["split_problem"] or ""), "the older split to be noticed")
        assert rig.call().version == "1"


def test_a_canary_whose_lease_runs_out_serves_nobody_until_it_moves(haproxy: Callable[..., Any]) -> None:
    with haproxy("--lease-seconds", "0.3") as rig:
        split = rig.write(100)
        rig.wait_until(lambda: rig.call().version == "1", "the lease to run out")

        def renew_and_ask() -> bool:
            nonlocal split
            split = renewed(split, "tiny")
            write_split(rig.home / "split.json", split)
            return str(rig.call().version) == "2"

        rig.wait_until(renew_and_ask, "the canary to be back")


def test_a_killed_haproxy_is_started_again_with_the_same_split(haproxy: Callable[..., Any]) -> None:
    with haproxy() as rig:
        rig.write(50)
        before = versions(rig, 40)
        old = pid_of(rig)
        os.kill(old, signal.SIGKILL)

        def is_back() -> bool:
            with contextlib.suppress(OSError, MansardError):
                return pid_of(rig) != old and rig.call().status == 200
            return False

        rig.wait_until(is_back, "another HAProxy")  # it answers from stable alone until its driver set the split
        rig.wait_until(lambda: versions(rig, 40) == before, "the same split")


def test_haproxy_serves_on_without_its_driver_and_the_next_one_finds_it(haproxy: Callable[..., Any]) -> None:
    with haproxy() as rig:
        split = rig.write(None)
        old = pid_of(rig)
        rig.worker.kill()
        rig.worker.wait()
        for _ in range(50):
            assert rig.call().version == "1"
        write_split(rig.home / "split.json", with_canary(split, "tiny", 2, rig.two.endpoint, "tiny", 100, 77))
        with rig.again():
            rig.wait_until(lambda: rig.seen()["term"] == 77, "term 77")
            rig.wait_until(lambda: rig.records()["next"] >= 49, "the lines of what was asked meanwhile")
            assert (rig.call().version, pid_of(rig)) == ("2", old)


def records_of(rig: Any, after: int, number: int) -> list[dict[str, Any]]:
    rig.wait_until(lambda: rig.records()["next"] == after + number, "the log's lines")
    answer = rig.records(after)
    return [dict(zip(answer["fields"], record, strict=True)) for record in answer["records"]]


def test_a_streams_first_token_and_its_pace_are_measured_and_nothing_is_held_up(haproxy: Callable[..., Any]) -> None:
    with haproxy() as rig:
        rig.write(0)
        after = rig.records()["next"]
        rig.one.behave(first_ms=100, interval_ms=20, tokens=16)
        rig.two.behave(first_ms=400, interval_ms=40, tokens=31)
        paces = {"1": (0.1, 15 * 0.02), "2": (0.4, 30 * 0.04)}
        seen = []
        for version in paces:
            begun = time.monotonic()
            with rig.stream(x_mansard_version=version) as answer:
                assert answer.readline()
                first = time.monotonic()
                assert answer.read().endswith(b"data: [DONE]\n\n")
                seen.append((first - begun, time.monotonic() - first))
        one, two = records_of(rig, after, 2)
        for record, (wait, pace), (waited, paced) in zip((one, two), paces.values(), seen, strict=True):
            assert paced > 0.9 * pace  # the first event did not wait for others
            assert 0.99 * wait <= record["ttft"] <= waited + 0.01
            assert 0.8 * pace < record["token"] * (record["output_tokens"] - 1) < waited + paced + 0.05
        assert two["output_tokens"] / one["output_tokens"] == pytest.approx(31 / 16, abs=0.05)
        rig.call()
        (whole,) = records_of(rig, after + 2, 1)
        assert whole["ttft"] is None and 0.1 < whole["output_tokens"] < 2


@pytest.mark.parametrize("waits", [{"fail": "hang"}, {"first_ms": 60_000}, {"interval_ms": 60_000}])
def test_a_client_that_goes_away_ends_its_engines_work(haproxy: Callable[..., Any], waits: dict[str, Any]) -> None:
    with haproxy() as rig:
        rig.write(None)
        rig.one.behave(**waits)
        after = rig.records()["next"]
        with rig.connect() as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(STREAM))
            client.sendall(STREAM)
            rig.wait_until(lambda: rig.one.seen()["in_flight"] == 1, "the engine to have it")
        rig.wait_until(lambda: rig.one.seen()["cancelled"] == 1, "the engine to be let off")
        (record,) = records_of(rig, after, 1)
        assert record["outcome"] == "cancelled"


def test_what_hangs_is_told_with_its_age_and_its_user(haproxy: Callable[..., Any]) -> None:
    with haproxy() as rig:
        rig.write(50)
        sides = versions(rig, 20)
        rig.one.behave(fail="hang")
        rig.two.behave(fail="hang")
        assert rig.records()["in_flight"] == []
        begun = time.monotonic()
        with contextlib.ExitStack() as clients:
            for user in range(20):
                client = clients.enter_context(rig.connect())
                head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-user-id: u{user}\r\n"
                client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(STREAM) + STREAM)
            rig.wait_until(lambda: len(rig.records()["in_flight"]) == 20, "all to be in flight")
            rig.wait_until(lambda: rig.counts(2)["oldest_in_flight_seconds"] > 0.5, "it to grow old")
            rig.wait_until(lambda: all(age > 0.4 for _, _, _, age, *_ in rig.records()["in_flight"]), "all to grow old")
            waiting = rig.records()["in_flight"]
            assert all(age <= time.monotonic() - begun + 0.01 for _, _, _, age, *_ in waiting)
            told = sorted(version for _, version, *_ in waiting)
            assert told == sorted(int(version) for version in sides.values())
            assert all((bucket_of(int(key, 16), "") < 5000) == (version == 2) for _, version, key, *_ in waiting)
        rig.wait_until(lambda: rig.records()["in_flight"] == [], "nothing to be in flight")


def test_without_its_driver_haproxy_takes_the_canary_to_nothing(haproxy: Callable[..., Any]) -> None:
    with haproxy("--lease-seconds", "2") as rig:
        split = rig.write(100)
        assert rig.call().version == "2"
        rig.worker.kill()
        rig.worker.wait()
        rig.wait_until(lambda: rig.call().version == "1", "the lease to run out in HAProxy")
        write_split(rig.home / "split.json", renewed(split, "tiny"))
        with rig.again():
            rig.wait_until(lambda: rig.call().version == "2", "the canary to be back")


def test_an_api_key_ties_a_user_to_a_version_where_nothing_else_does(haproxy: Callable[..., Any]) -> None:
    with haproxy() as rig:
        rig.write(50)
        seen = {key: {rig.call(authorization=f"Bearer {key}").version for _ in range(3)} for key in range(30)}
        assert {1} == {len(found) for found in seen.values()}
        assert {"1", "2"} == set.union(*seen.values())


def test_the_bodys_user_ties_as_the_header_does_and_the_engine_gets_every_byte(haproxy: Callable[..., Any]) -> None:
    with haproxy() as rig:
        rig.write(50)
        found = set()
        for number in range(30):
            body = f'{{"prompt": "x", "metadata": {{"user": "eve"}}, "user" :"u{number}"}}'.encode()
            replies = [rig.call(body=body), rig.call(x_user_id=f"u{number}"), rig.call(body=body)]
            (version,) = {reply.version for reply in replies}
            assert {"1": rig.one, "2": rig.two}[version].seen()["body"] == body.decode()
            found.add(version)
        assert found == {"1", "2"}


@pytest.mark.parametrize("user", ["42", "null", '""', '{"a": 1}', '["ann"]', '"\\ud800"', f'"{"a" * 1_000_000}"'])
def test_a_strange_user_is_the_engines_to_refuse(haproxy: Callable[..., Any], user: str) -> None:
    with haproxy() as rig:
        rig.write(50)
        filler = "x" * 100_000
        for body in (f'{{"user": {user}}}', f'{{"p": "{filler}", "user": {user}}}'):
            assert rig.call(body=body.encode()).status == 200


def test_no_line_is_lost_while_the_driver_is_busy(haproxy: Callable[..., Any]) -> None:
    with haproxy() as rig:
        rig.write(None)
        after = rig.records()["next"]
        rig.worker.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        versions(rig)
        ended = time.monotonic()
        rig.worker.send_signal(signal.SIGCONT)
        records = records_of(rig, after, 150)
        assert all(begun - 0.1 < record["ended"] < ended + 0.1 for record in records)


def test_a_body_without_a_length_is_limited_by_the_buffer(haproxy: Callable[..., Any]) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n%b\r\n"
    with haproxy() as rig:
        rig.write(None)
        for more in (b"", b"x: " + b"h" * 30_000 + b"\r\n"):  # a large head leaves the body less of the buffer
            with rig.connect() as client:
                client.sendall(head % more + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 40)
                assert client.recv(100).startswith(b"HTTP/1.1 413")
        assert rig.one.seen()["requests"] == 0
        with rig.connect() as client:
            client.sendall(head % b"" + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 10 + b"0\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_stables_500_is_its_answer_and_it_is_asked_once(haproxy: Callable[..., Any]) -> None:
    with haproxy() as rig:
        rig.write(0)
        rig.one.behave(fail="error500")
        assert (rig.call().status, rig.one.seen()["requests"]) == (500, 1)
        rig.two.behave(fail="error500")
        assert (rig.call(x_mansard_version="2").status, rig.two.seen()["requests"]) == (500, 1)
        rig.write(100)
        assert (rig.call().status, rig.one.seen()["requests"], rig.two.seen()["requests"]) == (500, 2, 2)


def test_a_pinned_version_that_is_not_there_is_not_answered_by_another(haproxy: Callable[..., Any]) -> None:
    with haproxy() as rig:
        rig.write(0)
        assert [rig.call(x_mansard_version=pin).status for pin in ("3", "02", "2", "1")] == [404, 404, 200, 200]
        rig.two.process.kill()
        rig.two.process.wait()
        assert rig.call(x_mansard_version="2").status in (404, 503)
