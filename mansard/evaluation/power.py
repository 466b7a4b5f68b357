"""What the gate may spend and what it can see: alpha of an attempt, power of a guard before anything is trained. Pure.

Attempt k is judged at 6 alpha / (pi^2 k^2), which sums to alpha over all attempts: nobody wins by trying again.
Power is that of showing "no loss beyond the margin" when nothing changed. Only guards have one: a target that passes at
no change is a mistake. Right or wrong answers: normal approximation. Means: files are planned for as if a few of them
lost much, since a bootstrap-t bound then lies further out (Hall 1988, section 4) and moves with the mean.
`make bench NAME=gate` prints what simulated gates do beside it.
"""

import math
from statistics import NormalDist

from mansard.errors import BadInput
from mansard.evaluation.bootstrap import widening
from mansard.evaluation.judgement import Plan
from mansard.evaluation.statistics import POWER
from mansard.specs.judging import Suite, SuiteRole

SKEWNESS = 3.0
"""That files' paired differences are planned for. The formula is rough: with 3 it gives the power that simulated gates
have with a skewness of 2 (0.74 with 73 files, 0.93 with 120); 0.4 and 1.9 were measured on the demo's suites."""
MOST_UNITS = 10**8


def alpha_of_attempt(alpha: float, attempt: int) -> float:
    """The one-sided level that attempt 1, 2, 3 ... is judged at."""
    if attempt < 1:
        raise ValueError(f"attempt {attempt}: attempts count from 1")
    return 6 * alpha / (math.pi**2 * attempt**2)


def power_at_no_change(margin: float, deviation: float, size: int, alpha: float, skewness: float = 0.0) -> float:
    """Probability that the bound holds the margin; `deviation` is that of one unit's paired difference.

    The bound lies `reach` standard errors out; the standard error rises with a skewed mean and varies by itself
    (a gamma's excess kurtosis, 1.5 skewness^2).
    """
    normal, root = NormalDist(), max(size, 1) ** 0.5
    z = normal.inv_cdf(1 - alpha)
    reach = z + skewness / (6 * root) * (2 * z * z + 1)
    reach *= widening(max(size, 1)) if skewness else 1.0
    slope = 1 + reach * skewness / (2 * root)
    wobble = reach**2 * (skewness**2 / 2 + 2) / (4 * max(size, 1)) if skewness else 0.0
    return normal.cdf((margin * root / deviation - reach) / (slope**2 + wobble) ** 0.5)


def size_needed(margin: float, deviation: float, alpha: float, skewness: float = 0.0) -> int | None:
    """Units for a power of 0.8; None where no number is enough."""
    if margin == 0:
        return None
    low, high = 1, MOST_UNITS
    while low < high:
        middle = (low + high) // 2
        is_enough = power_at_no_change(margin, deviation, middle, alpha, skewness) >= POWER
        low, high = (low, middle) if is_enough else (middle + 1, high)
    return low


def plan_guard(role: SuiteRole, kind: str, num_items: int, num_files: int, alpha: float) -> Plan:
    """The expected power of a guard with that many items from that many files."""
    if kind == "bits_per_byte":
        size, unit, deviation, skewness = num_files, "source files", role.expected_standard_deviation, SKEWNESS
    else:
        deviation = (role.expected_discordance * role.expected_design_effect) ** 0.5
        size, unit, skewness = num_items, "items", 0.0
    power = power_at_no_change(role.margin, deviation, size, alpha, skewness)
    return Plan(power, size, size_needed(role.margin, deviation, alpha, skewness), unit)


def check_power(role: SuiteRole, suite: Suite, num_items: int, num_files: int, alpha: float) -> None:
    """BadInput for a guard that would hardly pass even if nothing changed; names what would be enough."""
    if role.role != "guard":
        return
    if suite.kind == "harness" and suite.limit is None:
        raise BadInput(f"suite {suite.name}: a built-in task that guards needs limit: its items say what it can see")
    plan = plan_guard(role, suite.kind, num_items or suite.limit or 0, num_files, alpha)
    if plan.size and plan.power >= POWER:
        return
    if plan.needed is None:
        raise BadInput(f"suite {suite.name}: a guard with margin 0 can never be shown to hold; give it a margin")
    files = ""
    if plan.unit == "items" and num_files:
        per_file = num_items / num_files
        files = f" (about {math.ceil(plan.needed / per_file)} source files at {per_file:.1f} items a file)"
    raise BadInput(
        f"suite {suite.name}: with {plan.size} {plan.unit}, a margin of {role.margin:g} is shown at no change with a "
        f"probability of {plan.power:.2f} (one-sided level {alpha:.2g}), {POWER:g} is the least: {plan.needed} "
        f"{plan.unit} are needed{files}, or a wider margin"
    )
