"""Requests through a real router worker: who answers, who pays, and what a client sees when engines fail."""

import contextlib
import http.client
import itertools
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mansard.serving.split import (
    Split,
    bucket_of,
    key_digest,
    read_split,
    split_bytes,
    with_canary,
    with_endpoint,
    with_stable,
    without_canary,
)

pytestmark = pytest.mark.slow

STREAM = b'{"model": "tiny", "prompt": "x", "stream": true}'
DEADLINE_SECONDS = 60.0


def received(client: socket.socket) -> bytes:
    """All until the other side closes."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def key_of(is_canary: bool, percent: int) -> str:
    """A session that the split puts on the wanted side (see sticky_key)."""
    keys = (f"user-{i}" for i in itertools.count())
    digests = ((k, key_digest("tiny", f"/x-mansard-session/{k}")) for k in keys)
    return next(k for k, digest in digests if (bucket_of(digest, "") < percent * 100) == is_canary)


def test_a_session_stays_with_its_version_and_the_answer_says_which(rig: Any) -> None:
    rig.write(50)
    for is_canary, number, name in ((True, "2", "two"), (False, "1", "one")):
        replies = [rig.call(x_mansard_session=key_of(is_canary, 50)) for _ in range(3)]
        assert [(r.status, r.version, r.text) for r in replies] == [(200, number, name)] * 3
        assert {r.headers["x-mansard-model"] for r in replies} == {"tiny"}


def test_the_share_of_sessions_follows_the_weight_and_only_grows(rig: Any) -> None:
    canary: list[set[int]] = []
    for percent in (0, 10, 50, 100):
        rig.write(percent)
        replies = {i: rig.call(x_user_id=f"u{i}") for i in range(60)}
        canary.append({i for i, reply in replies.items() if reply.version == "2"})
    assert canary[0] < canary[1] < canary[2] < canary[3] == set(range(60))


def test_the_bodys_user_ties_to_a_version_and_the_engine_gets_every_byte(rig: Any) -> None:
    rig.write(50)
    versions = {}
    for number in range(40):
        body = f'{{"prompt": "x",  "metadata": {{"user": "eve"}}, "user" :"u{number}"}}'.encode()
        replies = [rig.call(body=body), rig.call(x_user_id=f"u{number}"), rig.call(body=body)]
        (versions[number],) = {reply.version for reply in replies}
        assert {"1": rig.one, "2": rig.two}[versions[number]].seen()["body"] == body.decode()
    assert 8 <= sum(version == "2" for version in versions.values()) <= 32


LONG = "x" * 1_000_000
STRANGE = ("42", "null", '""', '{"a": 1}', '["ann"]', '"\\ud800"', '"\\x"', f'"{LONG}"', '"ann", "user": 1')


@pytest.mark.parametrize("user", STRANGE)
def test_a_strange_user_is_the_engines_to_refuse_and_never_an_error_here(rig: Any, user: str) -> None:
    rig.write(50)
    for body in (f'{{"user": {user}}}', f'{{"p": "{LONG}", "user": {user}}}', f'{{"user": {user}, "p": "{LONG}"}}'):
        reply = rig.call(body=body.encode())
        assert reply.status == 200
        engine = {"1": rig.one, "2": rig.two}[reply.version]
        assert engine.seen()["body"] == body[:10_000]
        assert engine.seen()["headers"]["content-length"] == str(len(body))


def test_a_tester_pins_a_resident_version_and_no_other(rig: Any) -> None:
    rig.write(0)
    assert rig.call(x_mansard_version="2").text == "two"
    assert rig.call(x_mansard_version="1").text == "one"
    assert (rig.call(x_mansard_version="3").status, rig.call(x_mansard_version="v2").status) == (404, 400)


def test_a_stream_arrives_event_by_event_and_unchanged(rig: Any) -> None:
    rig.write(None)
    rig.one.behave(fail="hang-after-two")
    before = rig.counts(1)["requests"]
    with rig.stream() as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-mansard-version"] == "1"
        assert b'"one"' in answer.readline()  # there while the engine has not ended the stream
        assert rig.counts(1)["in_flight"] == 1
        rig.one.behave(fail="none")
        rest = answer.read()
    assert rest.count(b"data: ") == 16
    assert rest.endswith(b"data: [DONE]\n\n")
    rig.wait_until(lambda: rig.counts(1)["requests"] == before + 1, "the count")


@pytest.mark.parametrize(
    ("fail", "body"),
    [
        *itertools.product(("refuse", "error500"), (STREAM, None)),
        *itertools.product(("error-first", "die-before-event"), (STREAM,)),
    ],
)
def test_a_failing_canary_is_rescued_by_stable_and_pays_for_it(rig: Any, fail: str, body: bytes | None) -> None:
    rig.write(100)
    rig.two.behave(fail=fail)
    before = rig.counts(2)
    reply = rig.call(body=body)
    assert (reply.status, reply.version) == (200, "1")
    assert b"one" in reply.body
    after = rig.counts(2)
    assert (after["errors"] - before["errors"], after["rescues"] - before["rescues"]) == (1, 1)
    assert after["consecutive_failures"] >= 1


def test_a_dead_engine_is_rescued_and_consecutive_failures_end_with_a_success(rig: Any) -> None:
    split = rig.write(100)
    with rig.engine("three") as three:
        rig.put(with_canary(split, "tiny", 3, three.endpoint, "tiny", 100, next(rig.terms)))
        assert rig.call().text == "three"
        three.process.kill()
        three.process.wait()
        for expected in (1, 2, 3):
            assert rig.call().text == "one"
            assert rig.counts(3)["consecutive_failures"] == expected
    with rig.engine("three again") as three:
        rig.put(with_canary(split, "tiny", 3, three.endpoint, "tiny", 100, next(rig.terms)))
        assert rig.call().text == "three again"
    assert rig.counts(3)["consecutive_failures"] == 0


def test_a_request_that_waits_for_a_hung_engine_is_rescued_when_the_engine_is_killed(rig: Any) -> None:
    split = rig.write(100)
    with rig.engine("three") as three, ThreadPoolExecutor() as threads:
        three.behave(fail="hang")
        rig.put(with_canary(split, "tiny", 3, three.endpoint, "tiny", 100, next(rig.terms)))
        replies = [threads.submit(rig.call, "/v1/completions", body) for body in (STREAM, None)]
        rig.wait_until(lambda: three.seen()["in_flight"] == 2, "both requests at the engine")
        assert rig.counts(3)["oldest_waiting_seconds"] > 0
        three.process.kill()
        for reply in replies:
            assert (reply.result().status, reply.result().version) == (200, "1")


def test_a_pinned_request_is_not_rescued(rig: Any) -> None:
    rig.write(0)
    rig.two.behave(fail="error500")
    reply = rig.call(x_mansard_version="2")
    assert (reply.status, reply.version) == (500, "2")
    rig.two.behave(fail="refuse")
    reply = rig.call(x_mansard_version="2")
    assert (reply.status, reply.headers["retry-after"]) == (503, "2")


def test_nobody_left_to_ask_is_503_with_retry_after(rig: Any) -> None:
    rig.write(100)
    rig.one.behave(fail="refuse")
    rig.two.behave(fail="refuse")
    reply = rig.call()
    assert (reply.status, reply.headers["retry-after"]) == (503, "2")
    rig.put(with_endpoint(with_stable(Split(), "tiny", 1, None, "tiny", next(rig.terms)), "tiny", 1, None, "tiny"))
    assert rig.call().status == 503
    assert rig.call("/health", method="GET").status == 503


def test_an_engine_that_dies_under_way_ends_the_stream_with_an_error_event(rig: Any) -> None:
    rig.write(None)
    rig.one.behave(fail="die-mid-stream")
    before = rig.counts(1)["errors"]
    reply = rig.call(body=STREAM)
    *events, last = reply.body.strip().split(b"\n\n")
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert (len(events), error["type"], error["code"]) == (2, "engine_failed", 502)
    assert b"[DONE]" not in reply.body
    assert rig.counts(1)["errors"] == before + 1


def test_a_client_that_goes_away_cancels_the_engines_work(rig: Any) -> None:
    rig.write(None)
    rig.one.behave(fail="hang-after-two")
    cancelled = rig.one.seen()["cancelled"]
    with rig.stream() as answer:
        answer.readline()
    rig.wait_until(lambda: rig.one.seen()["cancelled"] == cancelled + 1, "the stream's cancellation")
    rig.one.behave(fail="hang")
    with rig.connect() as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        rig.wait_until(lambda: rig.one.seen()["in_flight"] == 1, "the request at the engine")
    rig.wait_until(lambda: rig.one.seen()["cancelled"] == cancelled + 2, "the cancellation before the first byte")
    rig.wait_until(lambda: rig.counts(1)["in_flight"] == 0, "the router to forget")
    assert rig.counts(1)["cancelled"] >= 2


def test_an_accepted_stream_outlives_the_split_that_chose_its_engine(rig: Any) -> None:
    rig.write(100)
    rig.two.behave(fail="hang-after-two")
    with rig.stream() as answer:
        assert b'"two"' in answer.readline()
        rig.put(without_canary(read_split(rig.home / "split.json"), "tiny", next(rig.terms)))
        assert rig.call().text == "one"
        rig.two.behave(fail="none")
        assert answer.read().endswith(b"data: [DONE]\n\n")


def test_an_engines_4xx_passes_through_and_is_counted_apart(rig: Any) -> None:
    rig.write(100)
    rig.two.behave(fail="error400")
    before = rig.counts(2)
    assert (rig.call().status, rig.call().version) == (400, "2")
    after = rig.counts(2)
    assert (after["errors"], after["engine_4xx"]) == (before["errors"], before["engine_4xx"] + 2)


@pytest.mark.parametrize(
    "target",
    [
        *("/pooling", "/update_weights", "/pause", "/metrics", "/observations", "/_seen", "/", "*"),
        *(
            "//v1/completions",
            "/v1/completions/",
            "/v1/%63ompletions",
            "/v1/../pooling",
            "http://127.0.0.1/v1/completions",
        ),
    ],
)
def test_other_paths_never_reach_an_engine(rig: Any, target: str) -> None:
    rig.write(None)
    before, counts = rig.one.seen()["requests"], rig.counts(1)
    assert rig.call(target).status in (400, 404)
    assert rig.call("/v1/completions", method="GET").status == 405
    assert (rig.one.seen()["requests"], rig.counts(1)) == (before, counts)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length : 2\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx: a\r\n b\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 20_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40 + b"\r\n\r\n",
    ],
    ids=["two lengths", "length and chunked", "space before colon", "folded", "huge", "TLS"],
)
def test_malformed_requests_get_400_and_reach_nobody(rig: Any, head: bytes) -> None:
    rig.write(None)
    before = rig.one.seen()["requests"]
    with rig.connect() as client:
        client.sendall(head)
        answer, _, body = received(client).partition(b"\r\n\r\n")
        assert answer.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
        assert b"aiohttp" not in answer
        assert json.loads(body)["error"]["message"] == "not a well-formed HTTP request"
    assert rig.one.seen()["requests"] == before


def test_an_engine_gets_the_body_as_it_was_and_no_credentials(rig: Any) -> None:
    rig.write(None)
    body = json.dumps({"prompt": "ä" * 100_000, "model": "tiny"}, ensure_ascii=False).encode()
    headers = {"authorization": "Bearer secret", "cookie": "a=b", "x_request_id": "r1", "connection": "x-drop"}
    assert rig.call("/v1/completions?a=b", body, **headers, x_drop="1", x_mansard_session="s").status == 200
    seen = rig.one.seen()
    assert seen["body"] == body.decode()[:10_000]
    assert seen["headers"]["content-length"] == str(len(body))
    assert seen["headers"]["x-request-id"] == "r1"
    assert not seen["headers"].keys() & {"authorization", "cookie", "x-drop", "x-mansard-session", "connection"}
    assert seen["paths"][-1] == "POST /v1/completions"


def test_a_chunked_body_is_taken_and_sent_on_whole(rig: Any) -> None:
    rig.write(None)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", rig.port, timeout=DEADLINE_SECONDS)) as client:
        client.request("POST", "/v1/completions", iter([b'{"prompt":', b' "x"}']), encode_chunked=True)
        with contextlib.closing(client.getresponse()) as answer:
            assert answer.status == 200
    assert (rig.one.seen()["body"], rig.one.seen()["headers"]["content-length"]) == ('{"prompt": "x"}', "15")


def test_who_asks_leaves_the_router_as_a_digest_only(rig: Any) -> None:
    rig.write(None)
    number = rig.records()["next"]
    log = rig.home / "logs/router-0-access.jsonl"
    assert rig.call(body=b'{"prompt": "x", "user": "ada@example.org"}').status == 200
    (record,) = rig.records(number)["records"]
    key = f"{key_digest('tiny', '/x-user-id/ada@example.org'):016x}"
    assert key in record
    rig.wait_until(lambda: log.exists() and key in log.read_text(), "the line")
    assert "ada@" not in log.read_text() + str(rig.records(number))


def test_a_lower_term_and_a_half_written_split_are_ignored(rig: Any) -> None:
    split = rig.write(100)
    path = rig.home / "split.json"
    path.write_bytes(split_bytes(with_stable(Split(), "tiny", 1, rig.one.endpoint, "tiny", split.term - 1)))
    rig.wait_until(lambda: "older" in (rig.seen()["split_problem"] or ""), "the older split to be noticed")
    assert rig.call().text == "two"
    path.write_bytes(split_bytes(split)[:50])
    rig.wait_until(lambda: "not a whole JSON" in (rig.seen()["split_problem"] or ""), "the broken split to be noticed")
    assert rig.call().text == "two"
    rig.write(None)
    assert (rig.seen()["split_problem"], rig.call().text) == (None, "one")


def test_models_are_listed_and_chosen_by_the_bodys_model(rig: Any) -> None:
    both = with_stable(rig.write(None), "other", 7, rig.two.endpoint, "other", next(rig.terms))
    rig.put(both)
    listed = json.loads(rig.call("/v1/models", method="GET").body)["data"]
    assert [model["id"] for model in listed] == ["other", "tiny"]
    reply = rig.call(body=b'{"model": "other"}')
    assert (reply.text, reply.version, reply.headers["x-mansard-model"]) == ("two", "7", "other")
    assert rig.call().text == "one"
    assert [rig.call(body=b).status for b in (b'{"model": "none"}', b"{", b"[1]")] == [404, 400, 404]
    empty = Split(next(rig.terms), {})
    rig.put(empty)
    reply = rig.call()
    assert (reply.status, "retry-after" in reply.headers) == (503, True)


def test_each_request_leaves_a_record_and_a_line_without_its_words(rig: Any) -> None:
    rig.write(100)
    number = rig.records()["next"]
    rig.two.behave(fail="refuse")
    secret = {"x_user_id": "ada@example.org", "x_request_id": "r-77"}
    assert rig.call(body=STREAM, **secret).version == "1"
    answer = rig.records(number)
    records = [dict(zip(answer["fields"], record, strict=True)) for record in answer["records"]]
    assert [(r["version"], r["outcome"], r["output_tokens"]) for r in records] == [(2, "error", None), (1, "ok", 16)]
    assert records[0]["key"] == records[1]["key"]
    assert 0 < records[1]["ttft"] <= records[1]["latency"]
    log = rig.home / "logs/router-0-access.jsonl"

    def lines() -> list[dict[str, Any]]:
        found = log.read_text().splitlines() if log.exists() else []
        return [line for line in map(json.loads, found) if line["request_id"] == "r-77"]

    rig.wait_until(lines, "the access log's line")
    (line,) = lines()
    assert (line["status"], line["asked"], line["user"]) == (200, [2, 1], records[0]["key"])
    assert "ada@example.org" not in log.read_text()
    assert '"prompt"' not in log.read_text()
