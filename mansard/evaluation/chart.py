"""chart.png: each suite before and after, and the change with its interval. The same results give the same bytes."""

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mansard.evaluation.comparison import Estimate
from mansard.evaluation.gate import HIGHER_IS_BETTER
from mansard.evaluation.judgement import Judgement, SuiteResult, outcome_of
from mansard.evaluation.wording import level_text, unit_of

INK, PALE, BEFORE, AFTER = "#24292f", "#d0d7de", "#8c959f", "#0969da"
OUTCOMES = {"pass": "#1a7f37", "fail": "#cf222e", "inconclusive": "#9a6700", "reported": "#6e7781"}
ROW_INCHES, HEAD_INCHES, WIDTH_INCHES, DPI = 1.05, 1.35, 11.0, 120
LABEL_LEFT = 0.015


def draw(judgement: Judgement) -> bytes:
    """PNG bytes; without a baseline, only the values."""
    has_baseline = any(s.evidence.baseline is not None for s in judgement.suites)
    rows = len(judgement.suites)
    height = HEAD_INCHES + ROW_INCHES * rows
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    columns = 2 if has_baseline else 1
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"hspace": 1.0, "wspace": 0.12})
    inch = 1 / height
    figure.subplots_adjust(left=0.24, right=0.975, top=1 - 1.15 * inch, bottom=0.42 * inch)
    color = OUTCOMES.get(judgement.verdict, AFTER)
    figure.text(LABEL_LEFT, 1 - 0.38 * inch, f"Verdict: {judgement.verdict}", fontsize=15, weight="bold", color=color)
    levels = {level_text(s.evidence.level) for s in judgement.suites}
    level = levels.pop() if len(levels) == 1 else "each suite's own"
    heads = [f"before (grey) and after (blue), {level} intervals" if has_baseline else f"value, {level} interval"]
    heads += [f"change, {level} interval; shaded: where it must not reach"] if has_baseline else []
    for axis, text in zip(axes[0], heads, strict=True):
        axis.annotate(text, (0, 1), (0, 18), "axes fraction", textcoords="offset points", fontsize=9, color=INK)
    for row, result in zip(axes, judgement.suites, strict=True):
        _label(row[0], result)
        _values(row[0], result)
        if has_baseline:
            _change(row[1], result)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _label(axis: Any, result: SuiteResult) -> None:  # noqa: ANN401 - matplotlib is untyped here
    evidence = result.evidence
    better = "higher" if HIGHER_IS_BETTER[evidence.measure] else "lower"
    unit = unit_of(evidence.measure) + (" in %" if evidence.measure == "accuracy" else "")
    lines = [
        (evidence.suite, 10.5, "bold", INK, 10),
        (f"{evidence.role}, n = {result.num_items}", 8.5, "normal", INK, -4),
        (f"{unit}, {better} is better", 8.5, "normal", "#57606a", -16),
    ]
    for text, size, weight, color, offset in lines:
        axis.annotate(
            text, (LABEL_LEFT, 0.5), (0, offset), ("figure fraction", axis.transAxes), textcoords="offset points",
            fontsize=size, weight=weight, color=color, va="center",
        )  # fmt: skip


def _values(axis: Any, result: SuiteResult) -> None:  # noqa: ANN401 - as above
    evidence = result.evidence
    scale = 1.0 if evidence.measure == "bits_per_byte" else 100.0
    if evidence.baseline is not None:
        _bar(axis, evidence.baseline.before, 0.66, BEFORE, scale)
    _bar(axis, result.after, 0.34, AFTER, scale)
    if evidence.measure == "accuracy" and evidence.chance:
        axis.axvline(scale * evidence.chance, color=PALE, linewidth=1.2, zorder=1)
        axis.annotate(
            "chance", (scale * evidence.chance, 1), (2, -2), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=7, color="#57606a", va="top",
        )  # fmt: skip
    _style(axis)


def _change(axis: Any, result: SuiteResult) -> None:  # noqa: ANN401 - as above
    evidence = result.evidence
    _style(axis)
    if evidence.baseline is None:
        axis.set_xticks([])
        return
    scale = 1.0 if evidence.measure == "bits_per_byte" else 100.0
    outcome = outcome_of(result)
    _bar(axis, evidence.baseline.effect, 0.5, OUTCOMES[outcome], scale)
    axis.axvline(0, color=INK, linewidth=0.9, zorder=1)
    if result.ruling.gates:
        sign = 1 if HIGHER_IS_BETTER[evidence.measure] else -1
        bound = sign * scale * (evidence.margin if evidence.role == "target" else -evidence.margin)
        axis.axvline(bound, color=OUTCOMES["fail"], linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        low, high = axis.get_xlim()
        axis.axvspan(bound, low if sign > 0 else high, color=OUTCOMES["fail"], alpha=0.07, linewidth=0, zorder=0)
        axis.set_xlim(low, high)
    axis.annotate(
        outcome, (1, 1), (0, 3), "axes fraction", textcoords="offset points",
        fontsize=9, weight="bold", color=OUTCOMES[outcome], ha="right",
    )  # fmt: skip


def _bar(axis: Any, estimate: Estimate, height: float, color: str, scale: float) -> None:  # noqa: ANN401 - as above
    if estimate.low is not None and estimate.high is not None:
        low, high = scale * estimate.low, scale * estimate.high
        axis.plot([low, high], [height, height], color=color, linewidth=5, alpha=0.35, solid_capstyle="round", zorder=2)
    axis.plot([scale * estimate.value], [height], "o", color=color, markersize=7, zorder=3)


def _style(axis: Any) -> None:  # noqa: ANN401 - as above
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    axis.margins(x=0.12)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.ticklabel_format(axis="x", useOffset=False)
    axis.tick_params(axis="x", labelsize=8, colors="#57606a", length=3, color=PALE)
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(PALE)
    axis.grid(axis="x", color="#eaeef2", linewidth=0.8, zorder=0)
    axis.set_axisbelow(True)
