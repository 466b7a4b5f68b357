"""Does it work? Ways to teach a model C and C++ after Python, at equal tokens.

A Llama is pre-trained on the Python files that are installed here (general), then learns the C and C++ headers beside
them (domain) with a fifth of general text: plain LLaMA Pro (even, no anchor), ours (the best placement, anchored), LoRA
on every linear, as many blocks of the base's own, full tuning; all but the last with equally many trained parameters.
The anchor asks less replay of general text for what it holds, so ours may take a smaller share of it and more of the
domain in the same tokens; `less_replay` is plain LLaMA Pro on the mixture that ours chose, so that the two can be told
apart. Rates (further ones while the highest is the best), placement, anchor and share are chosen on a seed and on
held-out text that are not counted; `--settings FILE` takes what an earlier run chose (the last line's `chosen`, in a
file) and runs those methods alone. Reported, over three seeds: gain on held-out domain text, loss on held-out general
text in bits per byte, with 95 % intervals (Student's t), peak memory; seconds are a run's steps times those of a step,
measured alone after all runs. `--work` keeps what is done, by scale, so a run goes on; `--jobs` runs several trainings
at a time (side_by_side.py); `--base-tokens N` pre-trains a base on fewer; `--mlflow URI` records it; the last line is
JSON.
"""

import argparse
import fcntl
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from efficacy_ground import FULL, SMALL, Ground, Scale, make_ground, on_this_machine
from side_by_side import Trainings, add_arguments, stand_on, work_folder
from ways_of_learning import wait

from mansard import expand
from mansard.models.attention_kernels import choose_kernel
from mansard.models.expand import plan
from mansard.models.freeze import freeze_except
from mansard.models.importance import losses
from mansard.models.loading import load_model
from mansard.specs.surgery import Expand
from mansard.specs.training import LearningRates
from mansard.training.anchor import Anchor
from mansard.training.blocks import checkpoint_names, train_only
from mansard.training.data import Mixture
from mansard.training.engines import LocalEngine
from mansard.training.optimizer import Group, Schedule

PILOT = 100
"""The seed on which rates and the like are chosen."""
SEEDS = (1, 2, 3)
STUDENT = 4.3027
"""Student's t at 97.5 % for three values."""
DOMAIN_SHARE = 0.8
IMPORTANCE_ROWS = 16
PLACEMENTS = ("even", "upper-half", "importance")
HELD = ((0.3, 0.8), (1.0, 0.8), (2.0, 0.9), (3.0, 0.9), (5.0, 0.95), (10.0, 0.95))
"""Anchors, each with a share of the domain: the stronger it holds, the less general text need be shown."""
RATES = {
    "llama_pro": (1e-3, 3e-3, 1e-2),
    "lora": (1e-3, 3e-3, 1e-2),
    "existing_blocks": (3e-4, 1e-3, 3e-3),
    "full_tuning": (3e-4, 1e-3, 3e-3),
}
MOST_RATES = 6
METHODS = ("llama_pro", "ours", "less_replay", "lora", "existing_blocks", "full_tuning")
TIMED_STEPS, WARMING_STEPS = 20, 3
LEAST_RUNS = 2 + sum(map(len, RATES.values())) + len(PLACEMENTS) + len(HELD) + len(METHODS) * (len(SEEDS) + 1)
"""With the base's losses, the importance of blocks and a timing of every method."""
Settings = dict[str, Any]


def model_of(ground: Ground, method: str, settings: Settings, seed: int) -> tuple[Any, list[Group], Anchor | None]:
    """The model, what of it trains, and what holds it."""
    rate, scale = settings["rate"], ground.scale
    if method in ("llama_pro", "ours", "less_replay"):
        positions = settings["positions"]
        with (ground.work / "expanding").open("w") as lock:  # the next process finds it made
            fcntl.flock(lock, fcntl.LOCK_EX)
            made = expand(ground.base, scale.new_blocks, positions, workspace=ground.work / "workspace")
        model = load_model(made.store.materialize(made.snapshot), scale.dtype, device=ground.device)
        names = checkpoint_names(made.store, made.snapshot)
        groups, _ = train_only(model, names, LearningRates(new_blocks=rate))
        blocks = {int(name.split(".")[2]) for name in names.new}
        weight = settings["anchor"]
        return model, groups, Anchor("kl", weight, blocks) if weight else None
    model = load_model(ground.base, scale.dtype, device=ground.device)
    if method == "lora":
        trained = _lora(model, scale, seed)
    elif method == "existing_blocks":
        chosen = plan(model.config.to_dict(), Expand(blocks=scale.new_blocks)).new_blocks
        below = tuple(f"model.layers.{block.source}." for block in chosen)
        trained = {name for name, _ in model.named_parameters() if name.startswith(below)}
    else:
        trained = {name for name, _ in model.named_parameters()}
    freeze_except(model, trained)
    return model, [Group(method, rate, {n: p for n, p in model.named_parameters() if n in trained})], None


def _lora(model: Any, scale: Scale, seed: int) -> set[str]:
    """Adapters on every linear of the blocks, of the rank that has as many parameters as the new blocks."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("model.layers.")]
    modules = dict(model.named_modules())
    a_rank = sum(modules[n].in_features + modules[n].out_features for n in names)
    wanted = scale.new_blocks * sum(p.numel() for p in model.model.layers[0].parameters())
    rank = round(wanted / a_rank)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)
    return {name for name, _ in model.named_parameters() if "lora_" in name}


def prepared(
    ground: Ground, method: str, settings: Settings, seed: int
) -> tuple[LocalEngine, Mixture, Schedule, list[Group]]:
    """What trains, on what, how."""
    scale = ground.scale
    model, groups, anchor = model_of(ground, method, settings, seed)
    engine = LocalEngine(model, groups, 0.0, 1.0, micro_batch_sequences=scale.micro, anchor=anchor)
    sources = [ground.training["domain"], ground.training["general"]]
    share = settings.get("share", DOMAIN_SHARE)
    mixture = Mixture(sources, [share, 1 - share], scale.batch, seed, {"general"})
    steps = steps_of(scale)
    return engine, mixture, Schedule(steps, steps // 20), groups


def steps_of(scale: Scale) -> int:
    return scale.tokens // (scale.batch * scale.sequence)


def train(ground: Ground, method: str, settings: Settings, seed: int) -> dict[str, Any]:
    engine, mixture, schedule, groups = prepared(ground, method, settings, seed)
    if ground.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(schedule.steps):
        engine.gradients(mixture.batch(step))
        engine.step(schedule.factor(step))
    bits = ground.bits(engine, is_pilot=seed == PILOT)
    peak = torch.cuda.max_memory_allocated() / 2**30 if ground.device.type == "cuda" else None
    count = sum(p.numel() for group in groups for p in group.parameters.values())
    return {**settings, **bits, "peak_gib": peak, "parameters": count}


def pace(ground: Ground, method: str, settings: Settings) -> dict[str, Any]:
    """Median seconds of a step, and of all of a run's."""
    engine, mixture, schedule, _ = prepared(ground, method, settings, PILOT)
    taken = []
    for step in range(WARMING_STEPS + TIMED_STEPS):
        began = time.perf_counter()
        engine.gradients(mixture.batch(step))
        engine.step(schedule.factor(min(step, schedule.steps - 1)))
        wait(ground.device)
        taken.append(time.perf_counter() - began)
    of_a_step = statistics.median(taken[WARMING_STEPS:])
    return {"seconds": of_a_step * schedule.steps, "of_a_step": of_a_step}


def importance(ground: Ground) -> dict[str, Any]:
    """The blocks without which the base loses least on general text."""
    model = load_model(ground.base, ground.scale.dtype, device=ground.device)
    ids_BT = torch.from_numpy(ground.training["general"].tokens_RT[:IMPORTANCE_ROWS].copy()).long()
    _, without = losses(model, ids_BT, choose_kernel(model, ids_BT.shape[1]))
    return {"blocks": sorted(sorted(range(len(without)), key=without.__getitem__)[: ground.scale.new_blocks])}


def best_rate(rates: Iterable[float], score: Callable[[float], float]) -> float:
    """The rate of the lowest score; while that is the highest of those tried, twice as high a one is tried too."""
    found = {rate: score(rate) for rate in rates}
    while (best := min(found, key=found.__getitem__)) == max(found) and len(found) < MOST_RATES:
        found[2 * best] = score(2 * best)
    return best


class Search:
    """Each method's settings, given or by the pilot seed: the rate with the best domain; for ours the placement with
    the best domain, then the anchor and share with the best domain that lose no more general text than plain LLaMA
    Pro."""

    def __init__(self, trainings: Trainings, given: dict[str, Settings]) -> None:
        self._trainings, self._given = trainings, given

    def settings(self, method: str) -> Settings:
        if method in self._given:
            return self._given[method]
        if method == "ours":
            return self._ours(self.settings("llama_pro"))
        if method == "less_replay":
            return self.settings("llama_pro") | {"share": self.settings("ours")["share"]}
        more: Settings = {"positions": "even", "anchor": 0.0} if method == "llama_pro" else {}
        self._ahead(method, [{"rate": rate, **more} for rate in RATES[method]])
        rate = best_rate(RATES[method], lambda rate: self._pilot(method, {"rate": rate, **more})["domain"])
        return {"rate": rate, **more}

    def _ours(self, plain: Settings) -> Settings:
        rate = plain["rate"]
        places: dict[str, Any] = {p: p for p in PLACEMENTS}
        self._trainings.ahead(("importance", importance))
        self._ahead("ours", [{"rate": rate, "positions": p, "anchor": 0.0} for p in PLACEMENTS if p != "importance"])
        places["importance"] = self._trainings.of("importance", importance)["blocks"]
        by_place = {p: {"rate": rate, "positions": places[p], "anchor": 0.0} for p in PLACEMENTS}
        self._ahead("ours", by_place.values())
        best = places[min(PLACEMENTS, key=lambda p: self._pilot("ours", by_place[p])["domain"])]
        tried = [{"rate": rate, "positions": best, "anchor": anchor, "share": share} for anchor, share in HELD]
        self._ahead("ours", tried)
        most = self._pilot("llama_pro", plain)["general"]
        keeping = [settings for settings in tried if self._pilot("ours", settings)["general"] <= most] or tried[:1]
        return min(keeping, key=lambda settings: self._pilot("ours", settings)["domain"])

    def _ahead(self, method: str, tried: Iterable[Settings]) -> None:
        self._trainings.ahead(*(call("pilot/" + method, method, settings) for settings in tried))

    def _pilot(self, method: str, settings: Settings) -> dict[str, Any]:
        return self._trainings.of(*call("pilot/" + method, method, settings))


def call(name: str, method: str, settings: Settings, seed: int = PILOT) -> tuple[Any, ...]:
    """A training as `Trainings` takes it, named by what it is of."""
    numbered = () if seed == PILOT else (str(seed),)
    return "/".join([name, *map(str, settings.values()), *numbered]), train, method, settings, seed


def run_all(
    trainings: Trainings, given: dict[str, Settings]
) -> tuple[dict[str, Settings], dict[str, list[dict[str, Any]]]]:
    """By method (those given, else all): its settings, and the runs of every seed at them, with its seconds."""
    search, methods = Search(trainings, given), [method for method in METHODS if method in (given or METHODS)]

    def runs(method: str) -> tuple[Settings, list[dict[str, Any]]]:
        settings = search.settings(method)
        calls = [call(method, method, settings, seed) for seed in SEEDS]
        trainings.ahead(*calls)
        return settings, [trainings.of(*one) for one in calls]

    found = dict(zip(methods, trainings.each(runs, methods), strict=True))
    chosen = {method: settings for method, (settings, _) in found.items()}
    paces = {m: trainings.alone("/".join(["pace", m, *map(str, s.values())]), pace, m, s) for m, s in chosen.items()}
    seconds = {method: {"seconds": paces[method]["seconds"]} for method in methods}
    return chosen, {method: [run | seconds[method] for run in of_seeds] for method, (_, of_seeds) in found.items()}


def interval(values: Iterable[float]) -> list[float]:
    """Mean, and half the width of its 95 % interval."""
    found = list(values)
    half = STUDENT * statistics.stdev(found) / len(found) ** 0.5
    return [round(statistics.mean(found), 5), round(half, 5)]


def summary(base: dict[str, float], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Gains on the domain, losses of general text, and ours beside plain LLaMA Pro and full tuning, pair by pair."""
    rows = {
        method: {
            "domain_gain": interval(base["domain"] - r["domain"] for r in found),
            "general_loss": interval(r["general"] - base["general"] for r in found),
            "seconds": round(statistics.mean(r["seconds"] for r in found), 1),
            "peak_gib": found[0]["peak_gib"],
            "parameters": found[0]["parameters"],
        }
        for method, found in runs.items()
    }
    lost = {method: row["general_loss"][0] for method, row in rows.items()}

    def ours_less(other: str, text: str) -> list[float]:
        return interval(a[text] - b[text] for a, b in zip(runs["ours"], runs[other], strict=True))

    beside = [other for other in ("llama_pro", "less_replay") if other in runs]
    return {
        "base": base,
        "methods": rows,
        **{f"{text}_of_ours_less_{other}": ours_less(other, text) for other in beside for text in base},
        "forgetting_full_over_ours": round(lost["full_tuning"] / lost["ours"], 2) if lost["ours"] > 0 else None,
    }


def record(found: dict[str, Any], runs: dict[str, list[dict[str, Any]]], uri: str) -> None:
    """One MLflow run a method and seed, under one parent."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("mansard efficacy")
    with mlflow.start_run(run_name="efficacy"):
        mlflow.log_dict(found, "efficacy.json")
        for method, of_seeds in runs.items():
            for seed, run in zip(SEEDS, of_seeds, strict=True):
                with mlflow.start_run(run_name=f"{method} seed {seed}", nested=True):
                    mlflow.log_params({"method": method, "seed": seed, **{k: run[k] for k in ("rate", "parameters")}})
                    mlflow.log_metrics({k: run[k] for k in ("domain", "general", "seconds")})


def given_settings(file: Path | None) -> dict[str, Settings]:
    given: dict[str, Settings] = json.loads(file.read_text()) if file else {}
    missing = {"llama_pro", "ours", "full_tuning"} - given.keys() if file else set()
    if missing or not given.keys() <= set(METHODS):
        raise SystemExit(f"{file}: llama_pro, ours and full_tuning are needed, of {', '.join(METHODS)} any")
    return given


def main(arguments: Sequence[str]) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="minutes on a CPU")
    parser.add_argument("--tiny", action="store_true", help="seconds: whether it runs, not what it finds")
    parser.add_argument("--settings", type=Path, help="JSON: settings by method; plain, ours and full tuning at least")
    parser.add_argument("--base-tokens", type=int, help="on which the base is pre-trained")
    parser.add_argument("--mlflow", help="a tracking URI")
    add_arguments(parser)
    asked = parser.parse_args(arguments)
    scale = SMALL.tiny() if asked.tiny else SMALL if asked.small else FULL
    if asked.base_tokens is not None:
        scale = replace(scale, base_tokens=asked.base_tokens)
    given = given_settings(asked.settings)
    least = 1 + len(given) * (len(SEEDS) + 1) if given else LEAST_RUNS
    with work_folder(asked.work, scale) as work:
        stand_on(work, lambda: make_ground(scale, work))
        with Trainings(work, on_this_machine, asked.jobs, began + asked.deadline, least) as trainings:
            trainings.ahead(("base", Ground.base_bits))
            chosen, runs = run_all(trainings, given)
            base = trainings.of("base", Ground.base_bits)
    found = summary(base, runs)
    found["chosen"] = chosen
    if asked.mlflow:
        record(found, runs, asked.mlflow)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
