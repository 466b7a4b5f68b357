"""How fast a way of learning is, measured over some steps with nothing beside it, and a whole run's seconds from that.

A branch's step costs the same all along; what comes on top in the first epoch is the base's forward pass over every row
that was not seen before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ways_of_learning import Learner, Point, learn, plan_of

STEPS = 60


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a step with known states, and of a row whose states the base computes first."""

    of_a_step: float
    of_a_new_row: float

    def timed(self, curve: Sequence[Point], tokens_per_step: int, rows_per_step: int, rows: int) -> list[Point]:
        """The curve of a run over a text of so many rows, each of which is seen once an epoch, in seconds of this."""
        found = []
        for point in curve:
            steps = point.tokens // tokens_per_step
            capturing = min(steps * rows_per_step, rows) * self.of_a_new_row
            found.append(replace(point, seconds=steps * self.of_a_step + capturing, capture_seconds=capturing))
        return found


def measured(made: Learner, mixture: Any, tokens_per_step: int, rows_per_step: int, rows: int, what: str) -> Pace:
    """Over no more steps than an epoch of `rows` has: every row is new."""
    steps = max(min(STEPS, rows // rows_per_step), 1)
    last = learn(made, mixture, [], plan_of(steps, tokens_per_step, 1), f"{what}, alone")[-1]
    of_a_new_row = last.capture_seconds / min(steps * rows_per_step, rows)
    return Pace((last.seconds - last.capture_seconds) / steps, of_a_new_row)
