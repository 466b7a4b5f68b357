"""What a stage reports of its progress, read so that it can be shown. Pure.

Guarantees: any value at all gives a reading, because what a stage says of its work must never end it. A number that is
absent, negative, not finite or no number counts as 0 (`completed`) or as unknown (`total`); text is one printable line.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Reading:
    """`total` is None while nobody knows how much there is to do; `metrics` are finite numbers."""

    completed: float = 0.0
    total: float | None = None
    unit: str = ""
    text: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def percent(self) -> float:
        """From 0 to 100; 0 without a total."""
        return 0.0 if self.total is None else min(100.0 * (self.completed / self.total), 100.0)

    def count(self) -> str:
        """How much is done, with its unit: "500/1,000 tokens"."""
        whole = "" if self.total is None else f"/{self.total:,.0f}"
        return f"{self.completed:,.0f}{whole} {self.unit}".rstrip()


def reading(progress: object) -> Reading:
    """The reading of a report as `mansard.launch.Progress` describes it, or of whatever came instead."""
    if not isinstance(progress, Mapping):
        return Reading()
    completed, total = _number(progress.get("done")), _number(progress.get("total"))
    metrics = progress.get("metrics")
    finite = {str(k): _number(v) for k, v in metrics.items()} if isinstance(metrics, Mapping) else {}
    return Reading(
        completed=max(completed or 0.0, 0.0),
        total=total if total is not None and total > 0 else None,
        unit=_line(progress.get("unit")),
        text=_line(progress.get("text")),
        metrics={name: value for name, value in finite.items() if value is not None},
    )


def _number(value: object) -> float | None:
    if not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _line(value: object) -> str:
    """One line without control characters: a file's name may hold any."""
    if value is None:
        return ""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
