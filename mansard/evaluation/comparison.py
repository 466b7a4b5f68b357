"""Two artifacts on one suite, as plain records: what statistics.py and pairing.py compute and every report reads.

Standard library only: `mansard review` shows a verdict without loading numpy.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval; `low` and `high` are None where there are too few clusters."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Spread:
    """What the spec's expectation is compared with. `standard_deviation` is that of the paired difference of a file;
    `discordance` the share of items that one artifact has right and the other wrong, None for means."""

    standard_deviation: float | None
    discordance: float | None
    design_effect: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two artifacts on one suite. `effect` is after - before, in the suite's own unit and direction."""

    num_items: int
    num_clusters: int
    before: Estimate
    after: Estimate
    effect: Estimate
    detectable: float | None
    spread: Spread | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Change:
    """One item's answers before and after. `gain` is in the suite's unit, turned so that more is better; `text` is
    where the item begins (its question's end), empty where the item is not at hand."""

    item: str
    cluster: str
    gain: float
    before: str
    after: str
    text: str


@dataclass(frozen=True, slots=True)
class Changes:
    """How many items got worse and better, and those that changed most, the greatest change first."""

    num_worse: int = 0
    num_better: int = 0
    worst: tuple[Change, ...] = ()
    best: tuple[Change, ...] = ()
