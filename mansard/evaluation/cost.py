"""Latency and memory of engines, measured side by side: a measurement, so never part of item records.

The same prompts go to each engine with the same concurrency, one engine at a time, in rounds that take turns (A B, B A,
A B), so that a drift of the machine touches both. Every round has prompts of its own: a repeated prompt would be
answered from the prefix cache. Prompts are random token ids of one length and answers are never cut short, so both
engines do the same work. How far the machine's noise reaches is told by the rounds: `ratio_high` is the upper end of a
one-sided 95 % t interval of the mean log ratio over rounds, and what production may be compared with.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import numpy as np

from mansard.errors import MansardError, StageFailed
from mansard.evaluation.engine_api import stream_events

ROUNDS = 6
"""Enough to take turns three times and to tell a spread, few enough that a round keeps the engine busy."""

CONFIDENCE = 0.95

Tokens = list[int]


@dataclass(frozen=True, slots=True)
class Target:
    """An engine to measure; `pid` is its first process, where memory is wanted."""

    endpoint: str
    served_name: str
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """Seconds from sending to the first token, between tokens, and to the last token; tokens answered."""

    first_token_seconds: float
    per_token_seconds: float
    whole_seconds: float
    num_tokens: int


def plan_rounds(prompts: int, prompt_tokens: int, vocabulary: int, seed: int = 0) -> list[list[Tokens]]:
    """The prompts of each round. Ids come from the middle of the vocabulary: special tokens stand at its ends."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(vocabulary // 4, max(vocabulary * 3 // 4, 1), size=(prompts, prompt_tokens)).tolist()
    rounds = min(ROUNDS, prompts)
    return [drawn[r::rounds] for r in range(rounds)]


def measure(
    targets: Mapping[str, Target],
    rounds: Sequence[Sequence[Tokens]],
    concurrency: int,
    output_tokens: int,
    report: Callable[[int, int], None],
) -> dict[str, dict[str, float]]:
    """Figures per target's name (see `figures`), and of candidate over baseline, where both are there, `ratio` and
    `ratio_high`."""
    replies: dict[str, list[list[Reply]]] = {name: [] for name in targets}
    busy_seconds = dict.fromkeys(targets, 0.0)
    names, done = list(targets), 0
    for name in names:  # the first answers at this concurrency pay for what the engine does once
        _ask_all(targets[name], [p[::-1] for p in rounds[0]], concurrency, output_tokens)
    for number, prompts in enumerate(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            started = time.monotonic()
            replies[name].append(_ask_all(targets[name], prompts, concurrency, output_tokens))
            busy_seconds[name] += time.monotonic() - started
            done += len(prompts)
            report(done, len(names) * sum(len(r) for r in rounds))
    found = {name: figures([*chain(*replies[name])], busy_seconds[name], targets[name].pid) for name in names}
    if {"candidate", "baseline"} <= found.keys():
        found["ratio"] = ratios(found["candidate"], found["baseline"])
        found["ratio_high"] = high_ratios(replies["candidate"], replies["baseline"])
    return found


def _ask_all(target: Target, prompts: Sequence[Tokens], concurrency: int, output_tokens: int) -> list[Reply]:
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(ask, repeat(target), prompts, repeat(output_tokens)))


def ask(target: Target, prompt: Tokens, output_tokens: int) -> Reply:
    """One streamed answer of exactly `output_tokens` tokens."""
    body = {
        "model": target.served_name,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    sent = time.monotonic()
    arrivals, num_tokens = [], 0
    for event in stream_events(target.endpoint, "/v1/completions", body):
        if "error" in event:
            raise MansardError(f"{target.endpoint}: {str(event['error'])[:200]}")
        if event.get("choices"):
            arrivals.append(time.monotonic())
        elif event.get("usage"):
            num_tokens = int(event["usage"]["completion_tokens"])
    if num_tokens != output_tokens or not arrivals:
        raise StageFailed(f"{target.endpoint}: {num_tokens} of {output_tokens} tokens were answered")
    between = (arrivals[-1] - arrivals[0]) / max(num_tokens - 1, 1)
    return Reply(arrivals[0] - sent, between, arrivals[-1] - sent, num_tokens)


def figures(replies: Sequence[Reply], busy_seconds: float, pid: int | None) -> dict[str, float]:
    """Milliseconds (median, 95th percentile), requests and tokens a second, resident memory where a pid is known."""
    columns = _latencies(replies)
    found = {
        f"{name}_p{q}": round(float(np.percentile(values, q)), 3) for name, values in columns.items() for q in (50, 95)
    }
    found["requests_per_second"] = round(len(replies) / busy_seconds, 3)
    found["tokens_per_second"] = round(sum(r.num_tokens for r in replies) / busy_seconds, 3)
    if pid is not None:
        found["memory_mb"] = round(memory_bytes(pid) / 1e6, 1)
    return found


def ratios(candidate: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """Candidate over baseline, for each figure of both."""
    return {k: round(candidate[k] / baseline[k], 4) for k in candidate if baseline.get(k)}


def high_ratios(candidate: Sequence[Sequence[Reply]], baseline: Sequence[Sequence[Reply]]) -> dict[str, float]:
    """Upper bounds of the ratios of median latencies, from the rounds (in one order for both); empty for one round."""
    if len(candidate) < 2:
        return {}
    from scipy.stats import t as student_t  # here, because it takes seconds that no verb needs

    found = {}
    rounds = [(_latencies(c), _latencies(b)) for c, b in zip(candidate, baseline, strict=True)]
    for name in rounds[0][0]:
        logs = np.log([np.median(c[name]) / max(np.median(b[name]), 1e-6) for c, b in rounds])
        error = float(np.std(logs, ddof=1)) / len(logs) ** 0.5
        high = float(np.mean(logs)) + float(student_t.ppf(CONFIDENCE, len(logs) - 1)) * error
        found[f"{name}_p50"] = round(float(np.exp(high)), 4)
    return found


def _latencies(replies: Sequence[Reply]) -> dict[str, list[float]]:
    return {
        "first_token_ms": [1000 * r.first_token_seconds for r in replies],
        "per_token_ms": [1000 * r.per_token_seconds for r in replies],
        "request_ms": [1000 * r.whole_seconds for r in replies],
    }


def memory_bytes(pid: int) -> int:
    """Resident memory of a process and its children; pages that they share are counted once (PSS)."""
    total, waiting = 0, [pid]
    while waiting:
        folder = Path("/proc") / str(waiting.pop())
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            for task in (folder / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return total
