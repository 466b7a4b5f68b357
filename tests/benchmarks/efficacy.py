"""Does it work? Five ways to teach a model C and C++ after Python, at equal tokens, text and order.

A Llama is pre-trained on the Python files that are installed here (general), then learns the C and C++ headers beside
them (domain) with a fifth of general text, five ways: plain LLaMA Pro (even, no anchor), ours (the best placement,
anchored), LoRA on every linear, as many blocks of the base's own, full tuning; all but the last with equally many
trained parameters. Rates (further ones while the highest is the best), placement and anchor are chosen on a seed and on
held-out text that are not counted. Reported, over three seeds: gain on held-out domain text, loss on held-out general
text in bits per byte, with 95 % intervals (Student's t), seconds, peak memory. `--work` keeps what is done, by scale,
so a run goes on; `--mlflow URI` records it; the last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from efficacy_ground import FULL, SMALL, Ground, Scale, make_ground

from mansard import expand
from mansard.canonical import write_atomically
from mansard.digest import digest_bytes
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
ANCHORS = (0.3, 1.0, 3.0)
RATES = {
    "llama_pro": (1e-3, 3e-3, 1e-2),
    "lora": (1e-3, 3e-3, 1e-2),
    "existing_blocks": (3e-4, 1e-3, 3e-3),
    "full_tuning": (3e-4, 1e-3, 3e-3),
}
MOST_RATES = 6
Settings = dict[str, Any]


def model_of(ground: Ground, method: str, settings: Settings, seed: int) -> tuple[Any, list[Group], Anchor | None]:
    """The model, what of it trains, and what holds it."""
    rate, scale = settings["rate"], ground.scale
    if method in ("llama_pro", "ours"):
        positions = settings["positions"]
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


def train(ground: Ground, method: str, settings: Settings, seed: int) -> dict[str, Any]:
    scale = ground.scale
    model, groups, anchor = model_of(ground, method, settings, seed)
    engine = LocalEngine(model, groups, 0.0, 1.0, micro_batch_sequences=scale.micro, anchor=anchor)
    sources = [ground.training["domain"], ground.training["general"]]
    mixture = Mixture(sources, [DOMAIN_SHARE, 1 - DOMAIN_SHARE], scale.batch, seed, {"general"})
    steps = scale.tokens // (scale.batch * scale.sequence)
    schedule = Schedule(steps, steps // 20)
    if ground.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for step in range(steps):
        engine.gradients(mixture.batch(step))
        engine.step(schedule.factor(step))
    bits = ground.bits(engine, is_pilot=seed == PILOT)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if ground.device.type == "cuda" else None
    count = sum(p.numel() for group in groups for p in group.parameters.values())
    return {**settings, **bits, "seconds": seconds, "peak_gib": peak, "parameters": count}


def importance(ground: Ground) -> list[int]:
    """The blocks without which the base loses least on general text."""
    model = load_model(ground.base, ground.scale.dtype, device=ground.device)
    ids_BT = torch.from_numpy(ground.training["general"].tokens_RT[:IMPORTANCE_ROWS].copy()).long()
    _, without = losses(model, ids_BT)
    return sorted(sorted(range(len(without)), key=without.__getitem__)[: ground.scale.new_blocks])


class Done:
    """What was run, by name, in a file that is written after each."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.runs: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def of(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in self.runs:
            self.runs[name] = run()
            write_atomically(self._file, json.dumps(self.runs).encode())
            print(f"{name}: {json.dumps(self.runs[name])}", file=sys.stderr, flush=True)
        found: dict[str, Any] = self.runs[name]
        return found


def best_rate(rates: Iterable[float], score: Callable[[float], float]) -> float:
    """The rate of the lowest score; while that is the highest of those tried, twice as high a one is tried too."""
    found = {rate: score(rate) for rate in rates}
    while (best := min(found, key=found.__getitem__)) == max(found) and len(found) < MOST_RATES:
        found[2 * best] = score(2 * best)
    return best


def choose(ground: Ground, done: Done) -> dict[str, Settings]:
    """Each method's settings, by the pilot seed: the rate with the best domain; for ours the placement with the best
    domain, then the rate and anchor with the best domain that lose no more general text than plain LLaMA Pro."""

    def pilot(method: str, settings: Settings) -> dict[str, Any]:
        name = f"pilot/{method}/" + "/".join(str(v) for v in settings.values())
        return done.of(name, lambda: train(ground, method, settings, PILOT))

    chosen: dict[str, Settings] = {}
    for method, rates in RATES.items():
        more: Settings = {"positions": "even", "anchor": 0.0} if method == "llama_pro" else {}
        rate = best_rate(rates, lambda r, method=method, more=more: pilot(method, {"rate": r, **more})["domain"])
        chosen[method] = {"rate": rate, **more}
    rate = chosen["llama_pro"]["rate"]
    places: dict[str, Any] = {p: p for p in PLACEMENTS}
    places["importance"] = done.of("importance", lambda: {"blocks": importance(ground)})["blocks"]
    by_place = {p: pilot("ours", {"rate": rate, "positions": places[p], "anchor": 0.0})["domain"] for p in PLACEMENTS}
    best = places[min(by_place, key=by_place.__getitem__)]
    tried = [{"rate": r, "positions": best, "anchor": a} for r in (rate, 2 * rate) for a in ANCHORS]
    plain = pilot("llama_pro", chosen["llama_pro"])["general"]
    keeping = [settings for settings in tried if pilot("ours", settings)["general"] <= plain] or tried[:1]
    chosen["ours"] = min(keeping, key=lambda settings: pilot("ours", settings)["domain"])
    return chosen


def named(method: str, chosen: dict[str, Settings], seed: int) -> str:
    return "/".join([method, *(str(value) for value in chosen[method].values()), str(seed)])


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
    ours, plain = runs["ours"], runs["llama_pro"]
    lost = {method: row["general_loss"][0] for method, row in rows.items()}
    return {
        "base": base,
        "methods": rows,
        "domain_of_ours_less_plain": interval(a["domain"] - b["domain"] for a, b in zip(ours, plain, strict=True)),
        "general_of_ours_less_plain": interval(a["general"] - b["general"] for a, b in zip(ours, plain, strict=True)),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="minutes on a CPU")
    parser.add_argument("--tiny", action="store_true", help="seconds: whether it runs, not what it finds")
    parser.add_argument("--work", type=Path, help="where what is done is kept")
    parser.add_argument("--mlflow", help="a tracking URI")
    asked = parser.parse_args()
    scale = SMALL.tiny() if asked.tiny else SMALL if asked.small else FULL
    with tempfile.TemporaryDirectory() as temporary:
        work = (asked.work or Path(temporary)) / digest_bytes(repr(scale).encode())[:12]
        work.mkdir(parents=True, exist_ok=True)
        ground, done = make_ground(scale, work), Done(work / "runs.json")
        base = done.of("base", ground.base_bits)
        chosen = choose(ground, done)
        runs = {
            method: [
                done.of(named(method, chosen, s), lambda m=method, s=s: train(ground, m, chosen[m], s)) for s in SEEDS
            ]
            for method in ("llama_pro", "ours", "lora", "existing_blocks", "full_tuning")
        }
    found = summary(base, runs)
    found["chosen"] = chosen
    if asked.mlflow:
        record(found, runs, asked.mlflow)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
