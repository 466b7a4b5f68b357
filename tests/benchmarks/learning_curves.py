"""Curves of loss against tokens and seconds: areas, intervals over seeds, the claim and a chart.

A run is a dict with its `curves` (one for every seed) and what else is told of it. Loss is bits per byte of "code".
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
from scipy.stats import t as student
from ways_of_learning import Point

CONFIDENCE = 0.95
COLORS = {"branch": "#0969da", "lora": "#9a6700", "full": "#8c959f"}

Axis = Callable[[Point], float]
AXES: Mapping[str, Axis] = {
    "tokens": lambda p: float(p.tokens),
    "seconds": lambda p: p.seconds,
    "node_seconds": lambda p: p.seconds - p.capture_seconds,
}


def area(curve: Sequence[Point], axis: Axis, horizon: float) -> float:
    """Mean loss from 0 to `horizon`, straight between points."""
    at = numpy.array([axis(p) for p in curve])
    loss = numpy.array([p.bits_per_byte["code"] for p in curve])
    inside = at < horizon
    xs = numpy.append(at[inside], horizon)
    return float(numpy.trapezoid(numpy.interp(xs, at, loss), xs) / horizon)


def reached(curve: Sequence[Point], axis: Axis, loss: float) -> float:
    """Where the curve first is at `loss`, straight between points; every run's lowest is no higher."""
    after = next(i for i, p in enumerate(curve) if p.bits_per_byte["code"] <= loss)
    if after == 0:
        return 0.0
    first, second = curve[after - 1], curve[after]
    fall = first.bits_per_byte["code"] - second.bits_per_byte["code"]
    share = (first.bits_per_byte["code"] - loss) / fall
    return axis(first) + share * (axis(second) - axis(first))


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and Student's interval."""
    mean = statistics.mean(values)
    half = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": round(mean, 5), "low": round(mean - half, 5), "high": round(mean + half, 5)}


def summary(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Areas, final losses and the claim."""
    areas = {}
    for name, axis in AXES.items():
        horizon = min(axis(curve[-1]) for run in runs.values() for curve in run["curves"])
        areas[name] = {way: [area(curve, axis, horizon) for curve in run["curves"]] for way, run in runs.items()}
    ways = {}
    common = max(curve[-1].bits_per_byte["code"] for run in runs.values() for curve in run["curves"])
    for way, run in runs.items():
        last = [curve[-1] for curve in run["curves"]]
        ways[way] = {key: value for key, value in run.items() if key != "curves"} | {
            "final_loss": interval([p.bits_per_byte["code"] for p in last]),
            "final_loss_of_what_it_knew": interval([p.bits_per_byte["docstrings"] for p in last]),
            "tokens_to_common_loss": interval([reached(curve, AXES["tokens"], common) for curve in run["curves"]]),
            "seconds_to_common_loss": interval([reached(curve, AXES["seconds"], common) for curve in run["curves"]]),
            **{f"area_{name}": interval(found[way]) for name, found in areas.items()},
            "tokens_per_second": round(statistics.mean(p.tokens / p.seconds for p in last)),
            "node_tokens_per_second": round(statistics.mean(p.tokens / AXES["node_seconds"](p) for p in last)),
        }
    beside = {name: {rival: beside_rival(found, rival) for rival in ("lora", "full")} for name, found in areas.items()}
    claims = {name: claim(found) for name, found in beside.items()}
    return {"common_loss": common, "ways": ways, "branch_beside": beside, "claim": claims}


def beside_rival(areas: Mapping[str, Sequence[float]], rival: str) -> dict[str, Any]:
    """The branch's area less a rival's, seed by seed."""
    found = interval([b - r for b, r in zip(areas["branch"], areas[rival], strict=True)])
    word = "faster" if found["high"] < 0 else "slower" if found["low"] > 0 else "not told apart"
    return {"area_difference": found, "branch_is": word}


def claim(beside: Mapping[str, Mapping[str, Any]]) -> str:
    """"confirmed" where the branch is faster than both, "refuted" where it is slower than one."""
    words = [found["branch_is"] for found in beside.values()]
    slower = [rival for rival, found in beside.items() if found["branch_is"] == "slower"]
    if slower:
        return f"refuted: slower than {' and '.join(slower)}"
    return "confirmed" if set(words) == {"faster"} else "not decided"


def write_curves(runs: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plain = {way: [[asdict(p) for p in curve] for curve in run["curves"]] for way, run in runs.items()}
    (folder / "curves.json").write_text(json.dumps(plain))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("tokens", "seconds"), strict=True):
        for way, run in runs.items():
            for seed, curve in enumerate(run["curves"]):
                xs, ys = [AXES[name](p) for p in curve], [p.bits_per_byte["code"] for p in curve]
                axes.plot(xs, ys, color=COLORS[way], linewidth=1.2, label=None if seed else way)
        axes.set_xlabel(name)
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("held-out code, bits per byte")
    figure.savefig(folder / "curves.png")
