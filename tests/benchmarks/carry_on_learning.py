"""Does a branch learn faster? Continued pre-training of a small base, beside LoRA and full tuning at equal tokens.

The base (a Llama made here) learns the docstrings of this Python's library and of some packages; then each way learns
the library's code from the same batches: a branch on the base's states, LoRA on every linear with as many parameters,
and all weights. Each way's rate is the one with the lowest final loss on seed 0 of those tried (three, and further ones
while the best is at the edge), which are told. Loss is bits per byte of files held out; rates are chosen by other such
files than are reported. `area_*`: its mean over the run
(tokens), and over the seconds that the fastest run took; `node_seconds` are without the base's forward passes, as where
other nodes make the states. The claim (GPT Carry-On, arXiv 2504.07513: faster convergence) is confirmed where the
branch's area is smaller than both others'. Seconds are measured alone, over some steps of every way after all runs, and
counted from the steps of a run (pace.py); `--jobs` runs several trainings at a time, `--work` keeps what is done. The
curves go to --output as curves.json and curves.png. Prints one JSON line last.
"""

import argparse
import json
import random
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from learning_curves import summary, write_curves
from pace import STEPS, Pace, measured
from side_by_side import Trainings, add_arguments, stand_on, work_folder
from ways_of_learning import WAYS, Point, choose_device, choose_rate, learn, learner, plan_of, pretrain, tell

from mansard.demo.base import train_tokenizer, untrained_model
from mansard.demo.corpus import Document, read_domains, without_near_duplicates
from mansard.training.data import Mixture, Packed, pack_texts
from mansard.training.engines import CPU_THREADS

PACKAGES = ("numpy", "networkx", "sympy")
SKIPPED = frozenset({"test", "tests", "site-packages", "dist-packages", "lib2to3", "_internal", "testing"})
HELD_OUT_SHARE = 0.06
CHOOSING = "code to choose rates by"


@dataclass(frozen=True, slots=True)
class Size:
    """What differs between a GPU's form and the small one."""

    model: Mapping[str, int]
    files: int
    row_tokens: int
    base_rows: int
    base_steps: int
    base_rate: float
    rows: int
    steps: int
    evaluations: int
    parameters: int
    rates: Mapping[str, Sequence[float]]
    most_rates: int
    seeds: int


LARGE = Size(
    model={"vocabulary": 4096, "hidden": 512, "intermediate": 1408, "blocks": 8, "heads": 8, "max_tokens": 512},
    files=0, row_tokens=512, base_rows=64, base_steps=600, base_rate=1e-3, rows=16, steps=600, evaluations=20,
    parameters=1_270_000, most_rates=5, seeds=3,
    rates={"branch": (5e-4, 1.5e-3, 5e-3), "lora": (5e-4, 1.5e-3, 5e-3), "full": (1e-4, 3e-4, 1e-3)},
)  # fmt: skip
SMALL = Size(
    model={"vocabulary": 512, "hidden": 64, "intermediate": 128, "blocks": 2, "heads": 2, "max_tokens": 128},
    files=120, row_tokens=64, base_rows=8, base_steps=20, base_rate=3e-3, rows=8, steps=10, evaluations=2,
    parameters=40_000, most_rates=2, seeds=2,
    rates={"branch": (3e-3, 1e-2), "lora": (3e-3, 1e-2), "full": (1e-3, 3e-3)},
)  # fmt: skip


def read_text(files: int) -> tuple[list[Document], list[Document]]:
    """(docstrings, code): of so many of the library's files and no package's, or (0) of everything there is."""
    docstrings, code = [], []
    library = Path(sysconfig.get_path("stdlib"))
    places = [library] if files else [library, *(Path(sysconfig.get_path("purelib"), p) for p in PACKAGES)]
    for place in places:
        names = [p.relative_to(place) for p in sorted(place.rglob("*.py"))]
        names = [n for n in names if not SKIPPED & set(n.parts)][: files or None]
        domains = read_domains(place, [n.as_posix() for n in names])
        docstrings += [Document(f"{place.name}/{d.file}", d.text) for d in domains["docstrings"]]
        code += domains["code"] if place is library else []
    return docstrings, code


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out), by file; training text near to what is held out is left out."""
    order = random.Random(0).sample(range(len(documents)), len(documents))
    count = max(round(len(documents) * HELD_OUT_SHARE), 1)
    held_out = [documents[i] for i in order[:count]]
    return without_near_duplicates([documents[i] for i in order[count:]], held_out), held_out


@dataclass(frozen=True, slots=True)
class Ground:
    """The base, the code to learn, held-out text of both kinds."""

    base: Any
    domain: Packed
    held_out: list[Packed]
    size: Size
    facts: dict[str, Any]


def make_ground(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A ground as it is kept: the base as its weights, the device by name."""
    docstrings, code = read_text(size.files)
    tell(f"text: {len(docstrings)} files of docstrings, {len(code)} of code")
    (known, known_held_out), (new, new_held_out) = split(docstrings), split(code)
    tokenizer = train_tokenizer([d.text for d in known], size.model["vocabulary"], size.model["max_tokens"])

    def packed(name: str, documents: Sequence[Document]) -> Packed:
        return pack_texts(name, [d.text for d in documents], tokenizer, size.row_tokens, 0)

    judged = {"docstrings": known_held_out, "code": new_held_out[::2], CHOOSING: new_held_out[1::2]}
    held_out = [packed(name, documents) for name, documents in judged.items()]
    training, domain = packed("docstrings", known), packed("code", new)
    model = untrained_model(dict(size.model), 0).to(device, dtype)
    plan = plan_of(size.base_steps, size.base_rows * size.row_tokens, 5)
    bits = pretrain(model, Mixture([training], [1.0], size.base_rows, 0), held_out, plan, size.base_rate)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()), "tokens": plan.tokens, "bits_per_byte": bits,
        "text_tokens": {"docstrings": int(training.tokens_RT.size), "code": int(domain.tokens_RT.size)},
    }  # fmt: skip
    return {
        "weights": {name: t.cpu() for name, t in model.state_dict().items()}, "device": device.type, "dtype": dtype,
        "text": (domain, held_out), "size": asdict(size), "facts": facts,
    }  # fmt: skip


def read_ground(kept: Mapping[str, Any]) -> Ground:
    size = Size(**kept["size"])
    return Ground(model_of(kept["weights"], size.model, 0, kept), *kept["text"], size, kept["facts"])


def model_of(weights: Mapping[str, Any], shape: Mapping[str, int], seed: int, kept: Mapping[str, Any]) -> Any:
    """A base that was kept, where it was made."""
    model = untrained_model(dict(shape), seed).to(kept["device"], kept["dtype"])
    model.load_state_dict(weights)
    return model


def one(ground: Ground, way: str, rate: float, seed: int) -> dict[str, Any]:
    """Curve and trained parameters of one run."""
    size = ground.size
    made = learner(way, ground.base, size.parameters, rate, seed)
    plan = plan_of(size.steps, size.rows * size.row_tokens, size.evaluations)
    curve = learn(made, mixture_of(ground, seed), ground.held_out, plan, f"{way}, rate {rate:g}, seed {seed}")
    return {"curve": [asdict(point) for point in curve], "parameters": made.parameters}


def mixture_of(ground: Ground, seed: int) -> Mixture:
    return Mixture([ground.domain], [1.0], ground.size.rows, seed)


def pace_of(ground: Ground, way: str) -> dict[str, Any]:
    size = ground.size
    made = learner(way, ground.base, size.parameters, size.rates[way][0], 0)
    rows = len(ground.domain)
    pace = measured(made, mixture_of(ground, 0), size.rows * size.row_tokens, size.rows, rows, way)
    return {"pace": asdict(pace), "rows": rows}


def all_runs(trainings: Trainings, size: Size) -> dict[str, dict[str, Any]]:
    """Of every way: final losses of the rates tried, the one taken, the seeds' curves at it, in seconds alone."""

    def call(way: str, rate: float, seed: int) -> tuple[Any, ...]:
        return f"{way}/{rate:g}/{seed}", one, way, rate, seed

    def runs(way: str) -> dict[str, Any]:
        def run(rate: float) -> tuple[float, dict[str, Any]]:
            made = trainings.of(*call(way, rate, 0))
            return made["curve"][-1]["bits_per_byte"][CHOOSING], made

        trainings.ahead(*(call(way, rate, 0) for rate in size.rates[way]))
        tried, rate, first = choose_rate(size.rates[way], size.most_rates, run)
        others = [call(way, rate, seed) for seed in range(1, size.seeds)]
        trainings.ahead(*others)
        curves = [made["curve"] for made in (first, *(trainings.of(*other) for other in others))]
        return {
            "parameters": first["parameters"], "rates_tried": tried, "rate": rate,
            "is_rate_at_edge": rate in (min(tried), max(tried)),
            "curves": [[Point(**point) for point in curve] for curve in curves],
        }  # fmt: skip

    found = dict(zip(WAYS, trainings.each(runs, WAYS), strict=True))
    for way, run in found.items():
        alone = trainings.alone(f"pace/{way}", pace_of, way)
        pace, tokens = Pace(**alone["pace"]), size.rows * size.row_tokens
        run["curves"] = [pace.timed(curve, tokens, size.rows, alone["rows"]) for curve in run["curves"]]
    return found


def facts_of(ground: Any) -> dict[str, Any]:
    """What the base is."""
    facts: dict[str, Any] = ground.facts
    return facts


def least_runs(size: Size, ways: Sequence[str]) -> int:
    """Rates, further seeds and the pace of every way, and the base's facts."""
    return 1 + sum(len(size.rates[way]) + size.seeds for way in ways)


def main(arguments: Sequence[str]) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="some seconds on a CPU: that it runs, not what is true")
    parser.add_argument("--output", type=Path, default=Path(".mansard/carry-on-learning"))
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    device, dtype = choose_device(chosen.device)
    size = SMALL if chosen.small else LARGE
    torch.set_num_threads(CPU_THREADS)
    with work_folder(chosen.work, Path(__file__).name, size, device.type) as work:
        stand_on(work, lambda: make_ground(size, device, dtype))
        least = least_runs(size, WAYS)
        with Trainings(work, read_ground, chosen.jobs, began + chosen.deadline, least) as trainings:
            facts = trainings.of("base", facts_of)
            runs = all_runs(trainings, size)
    write_curves(runs, chosen.output)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    told = {"device": name, "torch": torch.__version__, "base": facts, "seeds": size.seeds}
    told |= {"seconds_are": f"counted from at most {STEPS} steps alone", "jobs": chosen.jobs}
    print(json.dumps(told | {"tokens": runs["full"]["curves"][0][-1].tokens} | summary(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
