"""Fingerprints against a local HTTP server that answers as an engine does, and the comparison's rules."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mansard.errors import BadInput, MansardError
from mansard.evaluation.fingerprint import Answer, Fingerprint, compare, take

A, B, C = "token_id:1", "token_id:2", "token_id:3"


def fingerprint(*steps: dict[str, float]) -> Fingerprint:
    """One answer; at each step the likeliest token is taken."""
    chosen = [max(step, key=step.__getitem__) for step in steps]
    logprobs = tuple(step[t] for step, t in zip(steps, chosen, strict=True))
    return Fingerprint((Answer("p", tuple(chosen), logprobs, steps),))


SURE = {A: -0.1, B: -2.5, C: -4.0}


def test_equal_fingerprints_do_not_differ() -> None:
    assert compare(fingerprint(SURE, SURE), fingerprint(SURE, SURE), 0.1) == []


def test_moved_log_probability_differs_beyond_the_tolerance() -> None:
    assert compare(fingerprint(SURE), fingerprint({**SURE, A: -0.15}), 0.1) == []
    assert "moved by 0.400" in compare(fingerprint(SURE), fingerprint({**SURE, A: -0.5}), 0.1)[0]


def test_near_tie_may_fall_either_way() -> None:
    was, now = {A: -0.70, B: -0.73, C: -5.0}, {A: -0.73, B: -0.70, C: -5.0}
    assert compare(fingerprint(was), fingerprint(now), 0.1) == []


def test_what_follows_a_tie_is_not_compared() -> None:
    was, now = {A: -0.70, B: -0.73}, {A: -0.73, B: -0.70}
    assert compare(fingerprint(was, SURE), fingerprint(now, {C: -0.01}), 0.1) == []


def test_two_artifacts_that_are_equally_sure_of_other_tokens_differ() -> None:
    assert (
        "token 0 was token_id:1, now token_id:2"
        in compare(fingerprint({A: -0.1, B: -2.5}), fingerprint({B: -0.1, A: -2.5}), 0.1)[0]
    )


def test_token_that_was_not_among_the_likeliest_differs() -> None:
    assert compare(fingerprint({A: -0.7, B: -0.7}), fingerprint({C: -0.7, B: -0.7}), 5.0) != []


def test_shorter_answer_differs() -> None:
    assert "2 tokens were answered, now 1" in compare(fingerprint(SURE, SURE), fingerprint(SURE), 0.1)[0]


def test_other_prompts_differ() -> None:
    assert compare(fingerprint(SURE), Fingerprint(()), 0.1) != []


def test_not_a_number_differs() -> None:
    now = Fingerprint((Answer("p", (A,), (float("nan"),), (SURE,)),))
    assert compare(fingerprint(SURE), now, 0.1) != []


steps = st.lists(
    st.fixed_dictionaries({A: st.floats(-9, 0), B: st.floats(-9, 0), C: st.floats(-9, 0)}), min_size=1, max_size=5
)


@given(steps, steps, st.floats(0.001, 1))
def test_comparison_is_symmetric(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float) -> None:
    there = compare(fingerprint(*one), fingerprint(*other), tolerance)
    back = compare(fingerprint(*other), fingerprint(*one), tolerance)
    assert bool(there) == bool(back)


@given(steps)
def test_fingerprint_survives_json(some: list[dict[str, float]]) -> None:
    taken = fingerprint(*some)
    again = Fingerprint.from_json(json.loads(json.dumps(taken.as_json())))
    assert again.as_json() == taken.as_json() and compare(taken, again, 1e-9) == []


def test_other_format_is_refused() -> None:
    with pytest.raises(BadInput, match="format 2"):
        Fingerprint.from_json({"format": 2, "answers": []})


@contextmanager
def engine(answer: dict[str, object], asked: list[dict[str, object]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

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


def test_prompts_are_asked_one_at_a_time_and_greedily() -> None:
    found = {"tokens": [A], "token_logprobs": [-0.123456], "top_logprobs": [{A: -0.123456, B: -2.0}]}
    asked: list[dict[str, object]] = []
    with engine({"choices": [{"logprobs": found}]}, asked) as endpoint:
        taken = take(endpoint, "demo", ["one", "two"], 1)
    assert [a["prompt"] for a in asked] == ["one", "two"]
    assert all(a["temperature"] == 0 and a["max_tokens"] == 1 and a["model"] == "demo" for a in asked)
    assert [a.logprobs for a in taken.answers] == [(-0.1235,), (-0.1235,)]


def test_answer_without_log_probabilities_is_one_clear_line() -> None:
    with engine({"choices": [{"logprobs": None}]}, []) as endpoint, pytest.raises(MansardError, match="holds no log-"):
        take(endpoint, "demo", ["one"], 1)


def test_engine_that_is_down_is_one_clear_line() -> None:
    with pytest.raises(MansardError, match="is the engine up"):
        take("http://127.0.0.1:9", "demo", ["one"], 1)


def test_taking_a_fingerprint_needs_the_standard_library_only() -> None:
    code = (
        "import sys, mansard; before = set(sys.modules); import mansard.evaluation.fingerprint; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; print(sorted(new - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['mansard']"
