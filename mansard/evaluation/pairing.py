"""Two artifacts' item records on one suite, put side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from mansard.errors import StageFailed
from mansard.evaluation.item_records import Record, measure_of
from mansard.evaluation.statistics import Comparison, Estimate, compare, describe

_SAME = ("id", "cluster", "bytes", "answer", "options")
"""What belongs to the item and not to the artifact."""


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals are drawn: one-sided level, number of resamples, seed."""

    alpha: float
    resamples: int
    seed: int


@dataclass(frozen=True, slots=True)
class Change:
    """One item's answers before and after. `gain` is in the suite's unit, turned so that more is better."""

    item: str
    cluster: str
    gain: float
    before: str
    after: str


def check_paired(suite: str, against: str, before: Sequence[Record], after: Sequence[Record]) -> None:
    """Both answered the same items; else StageFailed names the first that differs."""
    if len(before) != len(after):
        raise StageFailed(f"suite {suite}: {against} answered {len(before)} items, the candidate {len(after)}")
    for b, a in zip(before, after, strict=True):
        if [b.get(k) for k in _SAME] != [a.get(k) for k in _SAME]:
            raise StageFailed(
                f"suite {suite}: {against} answered {b['id']!r} where the candidate answered {a['id']!r}, or the item "
                "changed; evaluate both on one snapshot of the suite"
            )


def compare_records(before: Sequence[Record], after: Sequence[Record], bootstrap: Bootstrap) -> Comparison:
    """The paired comparison; `before` and `after` hold the same items (`check_paired`)."""
    amount, sizes = _columns(after)
    return compare(
        [r[amount] for r in before],
        [r[amount] for r in after],
        sizes,
        [r["cluster"] for r in after],
        bootstrap.alpha,
        bootstrap.resamples,
        bootstrap.seed,
    )


def describe_records(records: Sequence[Record], bootstrap: Bootstrap) -> Estimate:
    """One artifact's value with its interval."""
    amount, sizes = _columns(records)
    return describe(
        [r[amount] for r in records],
        sizes,
        [r["cluster"] for r in records],
        bootstrap.alpha,
        bootstrap.resamples,
        bootstrap.seed,
    )


def changes(before: Sequence[Record], after: Sequence[Record]) -> list[Change]:
    """Every item whose answer changed, the greatest loss first; equal changes by id."""
    found = [_change(b, a) for b, a in zip(before, after, strict=True)]
    return sorted((c for c in found if c.gain != 0), key=lambda c: (c.gain, c.item))


def _change(before: Record, after: Record) -> Change:
    if "bits" in after:
        was, now = before["bits"] / before["bytes"], after["bits"] / after["bytes"]
        return Change(after["id"], after["cluster"], was - now, f"{was:.3f}", f"{now:.3f}")
    gain = float(after["correct"]) - float(before["correct"])
    return Change(after["id"], after["cluster"], gain, _answer(before), _answer(after))


def _answer(record: Record) -> str:
    right = {0: "wrong", 1: "right"}.get(record["correct"], f"{record['correct']:g}")
    return f"{right} (choice {record['chosen']})" if "chosen" in record else right


def _columns(records: Sequence[Record]) -> tuple[str, list[float]]:
    if measure_of(records) == "bits_per_byte":
        return "bits", [float(r["bytes"]) for r in records]
    return "correct", [1.0] * len(records)
