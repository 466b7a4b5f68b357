"""A judgement: what the gate said of each suite, and what a reader wants to see beside it. Plain records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mansard.evaluation.comparison import Changes, Estimate
from mansard.evaluation.gate import Evidence, Ruling, Verdict
from mansard.evaluation.suites import Item

ARTIFACTS = ("candidate", "baseline", "anchor")
"""Whose item records a judgement rests on."""


@dataclass(frozen=True, slots=True)
class Background:
    """What a reader wants beside the figures: items by suite and id, contamination.json, notes, and where the
    candidate came from (`provenance`: base_version, sources, train, stages). Cost is a measurement: see report.py."""

    items: Mapping[str, Mapping[str, Item]]
    contamination: dict[str, Any] | None
    provenance: Mapping[str, Any]
    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class Plan:
    """A guard's expected power. `size` and `needed` count files for means, items for right or wrong answers."""

    power: float
    size: int
    needed: int | None
    unit: str


@dataclass(frozen=True, slots=True)
class Expected:
    """What the spec expects of a guard at no change; see `SuiteRole` in specs/judging.py."""

    discordance: float
    design_effect: float
    standard_deviation: float


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """All that is known of one suite. `changes` are against the baseline; `plan` is the power that `expected` promised
    a guard with these items; both are None for other roles."""

    evidence: Evidence
    ruling: Ruling
    after: Estimate
    num_items: int
    num_clusters: int
    expected: Expected | None
    plan: Plan | None
    changes: Changes


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict and what it rests on. `alpha` is the one-sided level that this attempt spent of `budget`."""

    verdict: Verdict
    reason: str
    budget: float
    alpha: float
    attempts: Mapping[str, Any]
    suites: Sequence[SuiteResult]
    inputs: Mapping[str, Mapping[str, str]]
    background: Background


def outcome_of(result: SuiteResult) -> str:
    """The word in the verdict column."""
    return result.ruling.verdict if result.ruling.gates or result.ruling.verdict == "baseline" else "reported"
