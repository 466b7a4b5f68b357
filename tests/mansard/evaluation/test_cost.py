"""Cost is measured on real sockets: two servers that stream tokens as an engine does."""

import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mansard.errors import MansardError, StageFailed
from mansard.evaluation.cost import (
    Reply,
    Target,
    ask,
    high_ratios,
    measure,
    memory_bytes,
    plan_rounds,
    ratios,
)
from mansard.evaluation.report import cost_table


@contextmanager
def streaming_engine(name: str, heard: list[tuple[str, tuple[int, ...]]], short: bool = False) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            heard.append((name, tuple(body["prompt"])))
            count = body["max_tokens"] - short
            events: list[dict[str, Any]] = [{"choices": [{"text": "x"}]} for _ in range(count)]
            events.append({"choices": [], "usage": {"completion_tokens": count}})
            self.send_response(200)
            self.end_headers()
            for event in events:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
            if body["prompt"] != [0]:
                self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_both_engines_answer_the_same_prompts_in_turns() -> None:
    heard: list[tuple[str, tuple[int, ...]]] = []
    rounds = plan_rounds(prompts=12, prompt_tokens=5, vocabulary=1000)
    with streaming_engine("A", heard) as a, streaming_engine("B", heard) as b:
        targets = {"candidate": Target(a, "demo", os.getpid()), "baseline": Target(b, "demo")}
        found = measure(targets, rounds, concurrency=2, output_tokens=6, report=lambda done, total: None)
    measured = heard[4:]  # the first four warm the engines
    assert "".join(n for n, _ in measured) == 3 * "AABBBBAA"
    assert sorted(p for n, p in measured if n == "A") == sorted(p for n, p in measured if n == "B")
    assert len(set(heard)) == len(heard), "a prompt came twice: the prefix cache would answer it"
    assert found["candidate"]["memory_mb"] > 1 and "memory_mb" not in found["baseline"]
    assert all(value > 0 for figures in found.values() for value in figures.values())
    assert {"first_token_ms_p50", "per_token_ms_p50", "request_ms_p50"} == found["ratio_high"].keys()


def test_short_answer_stops_the_stage() -> None:
    with streaming_engine("A", [], short=True) as a, pytest.raises(StageFailed, match="5 of 6 tokens"):
        ask(Target(a, "demo"), [1, 2], 6)


def test_broken_stream_is_one_clear_line() -> None:
    with streaming_engine("A", []) as a, pytest.raises(MansardError, match="without \\[DONE\\]"):
        ask(Target(a, "demo"), [0], 6)


@given(st.integers(1, 50), st.integers(1, 20), st.integers(8, 300_000))
def test_rounds_hold_every_prompt_once_and_no_special_ids(prompts: int, tokens: int, vocabulary: int) -> None:
    rounds = plan_rounds(prompts, tokens, vocabulary)
    flat = [p for r in rounds for p in r]
    assert len(flat) == prompts and all(len(p) == tokens for p in flat) and all(rounds)
    assert all(vocabulary // 4 <= t < vocabulary * 3 // 4 for p in flat for t in p)


def test_ratio_is_candidate_over_baseline() -> None:
    cost = {"candidate": {"a": 3.0, "m": 1.0}, "baseline": {"a": 2.0}}
    assert ratios(cost["candidate"], cost["baseline"]) == {"a": 1.5}
    assert "| a | 2.00 | 3.00 |" in cost_table(cost)


def test_ratio_may_be_as_high_as_the_rounds_spread_and_one_round_tells_nothing() -> None:
    def rounds(*seconds: float) -> list[list[Reply]]:
        return [[Reply(s, s, s, 1)] for s in seconds]

    same = high_ratios(rounds(2, 4, 2, 4), rounds(1, 2, 1, 2))
    assert same == dict.fromkeys(same, 2.0)
    wide = high_ratios(rounds(1, 4, 1, 4), rounds(1, 1, 1, 1))  # the mean is 2, log ratios spread by 0.8
    assert all(value == pytest.approx(2 * math.exp(2.3534 * 0.8004 / 2), rel=1e-3) for value in wide.values())
    assert high_ratios(rounds(1), rounds(2)) == {}


def test_memory_of_a_process_that_ended_is_nothing() -> None:
    assert memory_bytes(2**22 + 1) == 0
