"""What an engine says of itself: vLLM's /metrics, read for what a rollout and a drain ask. Pure.

Guarantees: an engine that was started anew counts from zero, never negative; one that has something in flight and moves
nothing (no token, no prompt read, no memory taken) for HUNG_SECONDS is hung. Its figures are of all that it was asked:
users, testers and the host's own guard prompts; they have no user, so they are told beside the analysis, which is of
users (release/analysis.py). Does not cover: asking (http.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

HUNG_SECONDS = 90.0
"""A starved machine moves late: five engines on two cores starved a good one for a minute (2026-11-23). Where many
users wait, the ages of their requests abort long before."""
IN_FLIGHT = ("vllm:num_requests_running", "vllm:num_requests_waiting")
MOVING = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:kv_cache_usage_perc")
MEANS = {
    "first_token": "vllm:time_to_first_token_seconds",
    "per_token": "vllm:inter_token_latency_seconds",
    "request": "vllm:e2e_request_latency_seconds",
    "output": "vllm:request_generation_tokens",
}
"""By the analysis's names; `output` is in tokens, the others in seconds."""
_SAMPLES = {*IN_FLIGHT, *MOVING, *(f"{name}_{part}" for name in MEANS.values() for part in ("sum", "count"))}

Metrics = Mapping[str, float]
"""Samples by name, added up over an engine's labels."""


def parse_metrics(text: str) -> Metrics:
    """The samples that we know of; none where the text is of another kind."""
    lines = [line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] in _SAMPLES]
    found: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    except ValueError:
        return {}
    return found


def in_flight(metrics: Metrics) -> int | None:
    """Requests running or waiting; None where the engine does not say."""
    values = [metrics[name] for name in IN_FLIGHT if name in metrics]
    return round(sum(values)) if values else None


def means_since(before: Metrics, now: Metrics) -> dict[str, float]:
    """MEANS of what ended since; those of which nothing did are left out."""
    found = {}
    for name, metric in MEANS.items():
        count, total = (now.get(f"{metric}_{part}", 0.0) for part in ("count", "sum"))
        if count >= before.get(f"{metric}_count", 0.0):
            count -= before.get(f"{metric}_count", 0.0)
            total -= before.get(f"{metric}_sum", 0.0)
        if count > 0:
            found[name] = total / count
    return found


@dataclass(slots=True)
class Account:
    """One engine over a rollout: told again and again, a step at a time."""

    at_step: Metrics = field(default_factory=dict)
    now: Metrics = field(default_factory=dict)
    still_seconds: float = 0.0

    def begin_step(self) -> None:
        self.at_step = self.now

    def take(self, metrics: Metrics | None, num_waiting: int, seconds: float) -> None:
        """What the engine says now (None: it does not answer), `seconds` after it was asked before.

        `num_waiting` are the data plane's requests that wait for their first byte there: an engine that stopped may
        never have told of them. Not those that stream, because a client may be slow to read what was written long ago.
        """
        before, self.now = self.now, self.now if metrics is None else metrics
        is_waited_for = num_waiting > 0 or bool(in_flight(self.now))
        is_still = any(name in before for name in MOVING) and all(before.get(n) == self.now.get(n) for n in MOVING)
        self.still_seconds = self.still_seconds + seconds if is_still and is_waited_for else 0.0

    def means(self) -> dict[str, float]:
        return means_since(self.at_step, self.now)

    @property
    def is_hung(self) -> bool:
        return self.still_seconds >= HUNG_SECONDS


def means_text(canary: Mapping[str, float], stable: Mapping[str, float]) -> str:
    """One line for the journal and for people; empty where the canary's engine told nothing."""
    told = []
    for name, value in canary.items():
        unit = "tokens" if name == "output" else "s"
        told.append(f"{name} {value:.3g} {unit}" + (f" (stable {stable[name]:.3g})" if name in stable else ""))
    return f"the engines' own means: {', '.join(told)}" if told else ""
