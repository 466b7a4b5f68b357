"""Simulated gates: how often a harmful or unchanged candidate is promoted, the power, the coverage of each interval.

Worlds are drawn, judged by the library's own intervals, and counted. Bits per byte: files of unequal size whose
differences are skewed to either side (worse than measured: skewness 2), few and many, with the judge's own resamples,
shared by all worlds, so that each step is a matrix product. Right or wrong: independent items, and items whose file
decides with them. At the edge of the null a guard's true loss is exactly its margin and a target's gain exactly none;
`false_promotion_rate` is the worst of all those rates. The last line is JSON: alpha, limit (alpha + 3 Monte-Carlo
standard errors), false_promotion_rate, five_tries_rate, power (of the shipped guard), coverage (of each interval).
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mansard.evaluation.bootstrap import deviations, widening
from mansard.evaluation.judgement import Plan
from mansard.evaluation.power import alpha_of_attempt, plan_guard
from mansard.evaluation.score_interval import design_effect, tango_interval
from mansard.spec_files import load_spec
from mansard.specs.judging import Gate, SuiteRole
from mansard.specs.whole import UpgradeSpec

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 10_000
SKEWNESS = 2.0
SIZE_SPREAD = 0.3
"""Coefficient of variation of the files' sizes; measured 0.23 and 0.29 on the demo's suites."""
ANSWERS = ((100, 1, 0.0), (600, 1, 0.0), (120, 5, 0.0), (120, 5, 0.2), (60, 10, 0.1), (30, 10, 0.2))
"""Files, items of each, and how far the items of one go together."""
ANSWERS_MARGIN = 0.05
"""Five points: no shipped guard asks questions."""
SHIPPED_FILES = 120
"""Source files of the demo's suites."""
TRIES = 5
AT_ONCE = 250

Floats = NDArray[np.float64]
Bounds = tuple[Floats, Floats]


@dataclass(frozen=True, slots=True)
class Worlds:
    """Paired differences of many simulated suites: one row a world, one column a file. More is worse."""

    differences: Floats
    sizes: Floats


def draw_means(
    generator: np.random.Generator, worlds: int, files: int, truth: float, deviation: float, side: int
) -> Worlds:
    """A file's difference per byte is `truth` plus centred gamma noise, skewed to `side` (1: few files lose much)."""
    shape = 4 / SKEWNESS**2
    noise = side * (generator.gamma(shape, size=(worlds, files)) - shape) / shape**0.5
    spread = np.log(1 + SIZE_SPREAD**2) ** 0.5
    sizes = generator.lognormal(-spread * spread / 2, spread, (worlds, files))
    return Worlds(sizes * (truth + deviation * noise), sizes)


def bounds_of_means(drawn: Worlds, alphas: list[float], resamples: int) -> dict[float, Bounds]:
    """Bootstrap-t bounds of every world, with the draws that `resample` makes with seed 0."""
    files = drawn.sizes.shape[1]
    counts = resample_counts(files, resamples)
    parts: dict[float, list[Bounds]] = {a: [] for a in alphas}
    for start in range(0, len(drawn.sizes), AT_ONCE):
        d, s = drawn.differences[start : start + AT_ONCE], drawn.sizes[start : start + AT_ONCE]
        value = d.sum(axis=1) / s.sum(axis=1)
        excess = d - value[:, None] * s
        size = s @ counts.T
        shift = (excess @ counts.T) / size
        squares = (excess**2) @ counts.T - 2 * shift * ((excess * s) @ counts.T) + shift**2 * (s**2 @ counts.T)
        pivots = deviations(shift, squares, size, files, 0.0)
        error = (files / (files - 1) * (excess**2).sum(axis=1)) ** 0.5 / s.sum(axis=1) * widening(files)
        pivots.sort(axis=1)
        for alpha in alphas:
            upper, lower = (pivots[:, round(q * (resamples - 1))] for q in (1 - alpha, alpha))  # as `Resampled` does
            parts[alpha].append((value - upper * error, value - lower * error))
    return {a: (np.concatenate([p[0] for p in ps]), np.concatenate([p[1] for p in ps])) for a, ps in parts.items()}


def resample_counts(files: int, resamples: int) -> Floats:
    """How often each file is in each resample of the judge (seed 0)."""
    drawn = np.random.default_rng(0).integers(0, files, size=(resamples, files))
    flat = drawn + files * np.arange(resamples)[:, None]
    return np.bincount(flat.ravel(), minlength=resamples * files).reshape(resamples, files).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Answers:
    """Gained and lost answers, one row a world, one column a file; every file has `items` of them."""

    gains: Floats
    losses: Floats
    items: int


def draw_answers(
    generator: np.random.Generator, worlds: int, files: int, items: int, truth: float, discordance: float, tied: float
) -> Answers:
    """`truth` is the expected gain of an item. `tied` (0 to 1) is how far a file's items go together."""
    shares = np.array([(discordance + truth) / 2, (discordance - truth) / 2, 1 - discordance])
    chances = np.broadcast_to(shares, (worlds, files, 3))
    if tied:
        drawn = generator.gamma(np.broadcast_to(shares * (1 / tied - 1), (worlds, files, 3)))
        chances = drawn / drawn.sum(axis=2, keepdims=True)
    found = generator.multinomial(items, chances).astype(np.float64)
    return Answers(found[..., 0], found[..., 1], items)


def bounds_of_answers(drawn: Answers, alpha: float) -> Bounds:
    """Tango's bounds with the counts divided by the design effect, as `compare_answers` has them."""
    gains, losses = drawn.gains.sum(axis=1), drawn.losses.sum(axis=1)
    counts = np.full(drawn.gains.shape, float(drawn.items))
    inflation = design_effect(drawn.gains - drawn.losses, counts, gains + losses)
    return tango_interval(gains / inflation, losses / inflation, counts.sum(axis=1) / inflation, alpha)


def covered(bounds: Bounds, truth: float) -> float:
    return float(((bounds[0] <= truth) & (truth <= bounds[1])).mean())


def five_tries(
    generator: np.random.Generator, worlds: int, files: int, guard: SuiteRole, gate: Gate
) -> tuple[float, float]:
    """Share of worlds in which one of five unchanged candidates is promoted: by the gate, and at alpha each time."""
    is_promoted, is_plain = np.zeros(worlds, bool), np.zeros(worlds, bool)
    for attempt in range(1, TRIES + 1):
        level = alpha_of_attempt(gate.alpha, attempt)
        target = draw_means(generator, worlds, files, 0.0, guard.expected_standard_deviation, 1)
        harm = draw_means(generator, worlds, files, 0.0, guard.expected_standard_deviation, 1)
        gained = bounds_of_means(target, [level, gate.alpha], gate.resamples)
        held = bounds_of_means(harm, [level, gate.alpha], gate.resamples)
        is_promoted |= (gained[level][1] < 0) & (held[level][1] <= guard.margin)
        is_plain |= (gained[gate.alpha][1] < 0) & (held[gate.alpha][1] <= guard.margin)
    return float(is_promoted.mean()), float(is_plain.mean())


def ten_half_margins(generator: np.random.Generator, worlds: int, files: int, guard: SuiteRole, gate: Gate) -> Floats:
    """How many of ten upgrades, each half a margin worse than the one before, pass the guard; one number a world.

    Attempts start again after a promotion, so each is judged at the first attempt's level, against the version before
    it and against the anchor (the sum of all differences so far).
    """
    level = alpha_of_attempt(gate.alpha, 1)
    passed, is_stopped = np.zeros(worlds), np.zeros(worlds, bool)
    lost = Worlds(np.zeros((worlds, files)), np.ones((worlds, files)))
    for _ in range(10):
        step = draw_means(generator, worlds, files, guard.margin / 2, guard.expected_standard_deviation, 1)
        step = Worlds(step.differences / step.sizes * lost.sizes, lost.sizes)
        lost = Worlds(lost.differences + step.differences, lost.sizes)
        against = [bounds_of_means(w, [level], gate.resamples)[level][1] <= guard.margin for w in (step, lost)]
        is_stopped |= ~(against[0] & against[1])
        passed += ~is_stopped
    return passed


def shipped() -> Iterator[tuple[str, Gate, SuiteRole]]:
    """The guards of the shipped upgrade specs."""
    for path in sorted((ROOT / "configs/upgrade").glob("*.yaml")):
        gate = load_spec(UpgradeSpec, path).gate
        for role in gate.suites:
            if role.role == "guard":
                yield f"{path.stem}/{Path(role.suite).stem}", gate, role


def power_at_the_least(
    generator: np.random.Generator, worlds: int, plan: Plan, guard: SuiteRole, gate: Gate
) -> float:
    """Share of worlds in which an unchanged candidate passes the guard with as few files as the plan asks for."""
    assert plan.needed is not None
    level = alpha_of_attempt(gate.alpha, 1)
    same = draw_means(generator, worlds, plan.needed, 0.0, guard.expected_standard_deviation, 1)
    return float((bounds_of_means(same, [level], gate.resamples)[level][1] <= guard.margin).mean())


@dataclass(slots=True)
class Figures:
    """What was counted so far: how often harm passed, and how often intervals held the truth. `name` is the guard's."""

    name: str = ""
    false: dict[str, float] = field(default_factory=dict)
    coverage: dict[str, float] = field(default_factory=dict)

    def add(self, key: str, truth: float, bounds: Bounds, has_passed: NDArray[np.bool_]) -> None:
        key = f"{self.name}: {key}"
        self.false[key] = float(has_passed.mean())
        self.coverage[key] = covered(bounds, truth)
        told = f"passed at a true change of {truth:g}: {self.false[key]:.4f}, coverage {self.coverage[key]:.4f}"
        print(f"{key}: {told}", flush=True)


def edge_of_means(generator: np.random.Generator, pairs: int, gate: Gate, guard: SuiteRole, into: Figures) -> None:
    """A guard that loses its margin, and a target that gains nothing; many files and few, skewed to either side."""
    deviation = guard.expected_standard_deviation
    for files in (15, 30, 60, 120):
        for side, told in ((1, "few lose much"), (-1, "few gain much")):
            for truth, role in ((guard.margin, "guard"), (0.0, "target")):
                drawn = draw_means(generator, pairs, files, truth, deviation, side)
                bounds = bounds_of_means(drawn, [gate.alpha], gate.resamples)[gate.alpha]
                has_passed = bounds[1] <= guard.margin if role == "guard" else bounds[1] < 0
                into.add(f"bits, {role}, {files} files, {told}", truth, bounds, has_passed)


def edge_of_answers(generator: np.random.Generator, pairs: int, gate: Gate, guard: SuiteRole, into: Figures) -> None:
    """Right and wrong answers: independent items, and items whose file decides with them."""
    for files, items, tied in ANSWERS:
        drawn = draw_answers(generator, pairs, files, items, -ANSWERS_MARGIN, guard.expected_discordance, tied)
        bounds = bounds_of_answers(drawn, gate.alpha)
        key = f"answers, guard, {files} files of {items}, tied {tied:g}"
        into.add(key, -ANSWERS_MARGIN, bounds, bounds[0] >= -ANSWERS_MARGIN)


def power_of(generator: np.random.Generator, pairs: int, name: str, gate: Gate, guard: SuiteRole) -> float:
    """Share of worlds in which an unchanged candidate passes the guard at the first attempt."""
    level = alpha_of_attempt(gate.alpha, 1)
    same = draw_means(generator, pairs, SHIPPED_FILES, 0.0, guard.expected_standard_deviation, 1)
    power = float((bounds_of_means(same, [level], gate.resamples)[level][1] <= guard.margin).mean())
    plan = plan_guard(guard, "bits_per_byte", 300, SHIPPED_FILES, level)
    print(f"{name}: power at no change, {SHIPPED_FILES} files, attempt 1: {power:.4f} (planned {plan.power:.4f})")
    least = power_at_the_least(generator, pairs, plan, guard, gate)
    print(f"{name}: power with the {plan.needed} files that are asked for: {least:.4f}", flush=True)
    return power


def main(pairs: int = PAIRS) -> int:
    generator = np.random.default_rng(2026)
    found, powers, tries = Figures(), [], []
    for name, gate, guard in shipped():
        print(f"{name}: margin {guard.margin:g}, expected standard deviation {guard.expected_standard_deviation:g}")
        found.name = name
        edge_of_means(generator, pairs, gate, guard, found)
        edge_of_answers(generator, pairs, gate, guard, found)
        powers.append(power_of(generator, pairs, name, gate, guard))
        promoted, plain = five_tries(generator, pairs, SHIPPED_FILES, guard, gate)
        tries.append(promoted)
        print(f"five tries of no change: promoted {promoted:.4f}; at alpha each time {plain:.4f}", flush=True)
        passed = ten_half_margins(generator, min(pairs, 2_000), SHIPPED_FILES, guard, gate)
        ten = float((passed == 10).mean())
        print(f"ten upgrades of half a margin: {passed.mean():.2f} pass, at most {passed.max():.0f}, all ten {ten:.4f}")
    alpha = gate.alpha
    limit = alpha + 3 * (alpha * (1 - alpha) / pairs) ** 0.5
    worst = max(found.false.values())
    line = {
        "alpha": alpha,
        "limit": round(limit, 5),
        "false_promotion_rate": worst,
        "five_tries_rate": max(tries),
        "power": min(powers),
        "coverage": {k: round(v, 4) for k, v in found.coverage.items()},
    }
    print(json.dumps(line))
    return 0 if worst <= limit and max(tries) <= alpha else 1


if __name__ == "__main__":
    sys.exit(main(*(int(a) for a in sys.argv[1:])))
