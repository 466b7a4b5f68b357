"""Two artifacts' item records on one suite, put side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mansard.errors import StageFailed
from mansard.evaluation.comparison import Change, Changes, Comparison, Estimate
from mansard.evaluation.item_records import BITS_DECIMALS, Record, measure_of
from mansard.evaluation.statistics import compare_answers, compare_means, describe_answers, describe_means
from mansard.evaluation.suites import Item

TEXT_SHOWN = 160
"""Characters of an item or an answer that a report shows."""
ITEMS_SHOWN = 10
"""Changed items listed for the worse, and as many for the better."""
_SAME = ("id", "cluster", "bytes", "answer", "options")
"""What belongs to the item and not to the artifact."""


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals are drawn: one-sided level, number of resamples, seed."""

    alpha: float
    resamples: int
    seed: int


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
    was, now, clusters = [r[amount] for r in before], [r[amount] for r in after], [r["cluster"] for r in after]
    if amount == "correct" and _is_right_or_wrong([*before, *after]):
        return compare_answers(was, now, clusters, bootstrap.alpha)
    grain = 10.0**-BITS_DECIMALS if amount == "bits" else 0.0
    return compare_means(was, now, sizes, clusters, bootstrap.alpha, bootstrap.resamples, bootstrap.seed, grain)


def describe_records(records: Sequence[Record], bootstrap: Bootstrap) -> Estimate:
    """One artifact's value with its interval."""
    amount, sizes = _columns(records)
    values, clusters = [r[amount] for r in records], [r["cluster"] for r in records]
    if amount == "correct" and _is_right_or_wrong(records):
        return describe_answers(values, clusters, bootstrap.alpha)
    return describe_means(values, sizes, clusters, bootstrap.alpha, bootstrap.resamples, bootstrap.seed)


def changes(before: Sequence[Record], after: Sequence[Record], items: Mapping[str, Item]) -> Changes:
    """Which items changed, the greatest change first; equal changes by id. `items` are known by their ids."""
    found = [_change(b, a, items.get(a["id"], {})) for b, a in zip(before, after, strict=True)]
    worse = sorted((c for c in found if c.gain < 0), key=lambda c: (c.gain, c.item))
    better = sorted((c for c in found if c.gain > 0), key=lambda c: (-c.gain, c.item))
    return Changes(len(worse), len(better), tuple(worse[:ITEMS_SHOWN]), tuple(better[:ITEMS_SHOWN]))


def _change(before: Record, after: Record, item: Item) -> Change:
    if "bits" in after:
        was, now = before["bits"] / before["bytes"], after["bits"] / after["bytes"]
        text = str(item.get("text", ""))[:TEXT_SHOWN]
        return Change(after["id"], after["cluster"], was - now, f"{was:.3f}", f"{now:.3f}", text)
    gain = float(after["correct"]) - float(before["correct"])
    text = str(item.get("context", after.get("asked", "")))[-TEXT_SHOWN:]
    return Change(after["id"], after["cluster"], gain, _answer(before, item), _answer(after, item), text)


def _answer(record: Record, item: Item) -> str:
    right = {0: "wrong", 1: "right"}.get(record["correct"], f"{record['correct']:g}")
    if "said" in record:
        return f"{right}: {record['said']}"
    if "chosen" not in record:
        return right
    if "choices" not in item:
        return f"{right} (choice {record['chosen']})"
    return f"{right}: {item['choices'][record['chosen']].strip()[:TEXT_SHOWN]}"


def _is_right_or_wrong(records: Sequence[Record]) -> bool:
    """Built-in tasks may grade answers between 0 and 1; then their mean is what is compared."""
    return all(r["correct"] in (0, 1) for r in records)


def _columns(records: Sequence[Record]) -> tuple[str, list[float]]:
    if measure_of(records) == "bits_per_byte":
        return "bits", [float(r["bytes"]) for r in records]
    return "correct", [1.0] * len(records)
