"""What else than the final layer is worth reading? Branches that tap layers of one base, and branches on two bases,
beside the plain form at equal trained parameters and equal tokens.

Three bases are made here, of one shape and one tokenizer: one that knows docstrings (of this Python's library and some
packages), its twin (the same text, another seed) and one that knows the packages' code. A branch on the first one then
learns the library's code. Forms: `final` (the plain one), `even` (three layers evenly below, too), `late` (the three
layers before the last), `projected` (as even, with a projection for each layer instead of one for their sum), `mixture`
(the code's base beside the first), `twin` (the twin beside it: more states, nothing new known). Each form's rate is the
best of those tried on seed 0, by held-out code that is not reported. `gains`: bits per byte of held-out code that a
form saves against `final`, seed by seed, with Student's interval over the seeds; it is shown where the interval lies
above 0, refuted where it lies below. `--jobs` runs several trainings at a time, `--work` keeps what is done. Prints one
JSON line last.
"""

import argparse
import json
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from carry_on_learning import SKIPPED, facts_of, model_of, split
from learning_curves import interval
from side_by_side import Trainings, add_arguments, stand_on, work_folder
from ways_of_learning import CLIP_NORM, Learner, choose_device, learn, plan_of, pretrain, tell, wait

from mansard.carry_on.branch import Branch
from mansard.carry_on.flat import FlatWeights
from mansard.carry_on.head import Head
from mansard.carry_on.loader import Part
from mansard.carry_on.model import tapped_states
from mansard.carry_on.node_engine import BranchEngine
from mansard.carry_on.wire import Coded
from mansard.composition.shape import shape_of_size
from mansard.demo.base import train_tokenizer, untrained_model
from mansard.demo.corpus import Document, read_domains, without_near_duplicates
from mansard.training.data import Batch, Mixture, Packed, pack_texts
from mansard.training.engines import CPU_THREADS
from mansard.training.optimizer import Group, MasterAdamW
from mansard.training.packing import mask_of


@dataclass(frozen=True, slots=True)
class Size:
    """What differs between a GPU's form and the small one. `taps` are by form; `files`: of each place (0: all)."""

    model: Mapping[str, int]
    taps: Mapping[str, Sequence[int]]
    files: int
    row_tokens: int
    base_rows: int
    base_steps: int
    base_rate: float
    rows: int
    steps: int
    held_out_rows: int
    parameters: int
    rates: Sequence[float]
    seeds: int


LARGE = Size(
    model={"vocabulary": 4096, "hidden": 512, "intermediate": 1408, "blocks": 8, "heads": 8, "max_tokens": 512},
    taps={"final": (), "even": (2, 4, 6), "late": (5, 6, 7), "projected": (2, 4, 6), "mixture": (), "twin": ()},
    files=0, row_tokens=512, base_rows=64, base_steps=800, base_rate=1e-3, rows=16, steps=400, held_out_rows=192,
    parameters=1_270_000, rates=(4e-3, 8e-3), seeds=3,
)  # fmt: skip
SMALL = Size(
    model={"vocabulary": 512, "hidden": 64, "intermediate": 128, "blocks": 4, "heads": 2, "max_tokens": 128},
    taps={"final": (), "even": (1, 2, 3), "projected": (1, 2, 3), "mixture": ()},
    files=60, row_tokens=64, base_rows=8, base_steps=20, base_rate=3e-3, rows=8, steps=8, held_out_rows=16,
    parameters=60_000, rates=(1e-2,), seeds=2,
)  # fmt: skip
PACKAGES = ("numpy", "networkx", "sympy")
BESIDE = {"mixture": "code", "twin": "twin"}
"""Which base stands beside the first one."""
PROJECTED = "projected"


class States:
    """What the bases say of a batch: the first one's final state, its taps, the others' final states."""

    def __init__(self, bases: Sequence[Any], taps: Sequence[int]) -> None:
        self._decoders = [base.get_decoder() for base in bases]
        self._taps = taps
        self.seconds = 0.0

    def parts(self, batch: Batch) -> list[Part]:
        """The whole batch as one piece."""
        begun = time.perf_counter()
        device, dtype = self._decoders[0].device, self._decoders[0].dtype
        positions_BT = batch.positions_BT.to(device)
        inputs = {
            "input_ids": batch.tokens_BT.to(device), "position_ids": positions_BT, "use_cache": False,
            "attention_mask": mask_of(positions_BT, dtype),
        }  # fmt: skip
        with torch.no_grad():
            found = [tapped_states(d, () if i else self._taps, **inputs) for i, d in enumerate(self._decoders)]
        states_NW = torch.cat(found, dim=-1).flatten(0, 1)
        wait(device)
        self.seconds += time.perf_counter() - begun
        return [Part(slice(0, len(states_NW)), Coded(states_NW), torch.empty(0, dtype=torch.int64), batch.positions_BT)]

    def forget(self) -> None:
        self.seconds = 0.0


def learner(bases: Sequence[Any], form: str, size: Size, rate: float, seed: int) -> Learner:
    """A branch of the size's parameters on the first base's head."""
    taps = size.taps[form]
    weight_VD = bases[0].get_output_embeddings().weight.detach()
    others = [base.config.hidden_size for base in bases[1:]]
    shape = shape_of_size(weight_VD.shape[1], size.parameters, 2, taps, others, form == PROJECTED)
    branch = Branch(shape)
    branch.start(seed)
    branch.to(weight_VD.device, weight_VD.dtype)
    weights, states = FlatWeights(branch), States(bases, taps)
    optimizer = MasterAdamW([Group("branch", rate, weights.parameters)], 0.0)
    head = Head(weight_VD.cpu(), weight_VD.device, weight_VD.dtype)
    engine = BranchEngine(weights, head, states, optimizer, 1.0, CLIP_NORM)
    return Learner(engine, None, branch.shape.parameters, states)


def read_text(files: int) -> tuple[list[Document], list[Document], list[Document]]:
    """(docstrings of everything, the library's code, the packages' code)."""
    docstrings, new, packages = [], [], []
    library = Path(sysconfig.get_path("stdlib"))
    for place in [library, *(Path(sysconfig.get_path("purelib"), name) for name in PACKAGES)]:
        names = [p.relative_to(place) for p in sorted(place.rglob("*.py"))]
        names = [n for n in names if not SKIPPED & set(n.parts)][: files or None]
        domains = read_domains(place, [n.as_posix() for n in names])
        docstrings += [Document(f"{place.name}/{d.file}", d.text) for d in domains["docstrings"]]
        named = [Document(f"{place.name}/{d.file}", d.text) for d in domains["code"]]
        (new if place is library else packages).extend(named)
    return docstrings, new, packages


@dataclass(frozen=True, slots=True)
class Ground:
    """The bases by name (`first` is the one whose head is used), the code to learn, held-out code, what they are."""

    bases: Mapping[str, Any]
    domain: Packed
    held_out: Packed
    size: Size
    facts: dict[str, Any]


def make_ground(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A ground as it is kept: the bases as their weights, the device by name."""
    docstrings, new, packages = read_text(size.files)
    known, known_held_out = split(docstrings)
    domain, held_out = split(new)
    packages = without_near_duplicates(packages, held_out)
    tokenizer = train_tokenizer([d.text for d in known], size.model["vocabulary"], size.model["max_tokens"])
    tell(f"text: {len(known)} files of docstrings, {len(domain)} of code to learn, {len(packages)} of packages' code")

    def packed(name: str, documents: Sequence[Document]) -> Packed:
        return pack_texts(name, [d.text for d in documents], tokenizer, size.row_tokens, 0)

    texts = {"docstrings": packed("docstrings", known), "packages": packed("packages", packages)}
    judged = [packed("docstrings", known_held_out), packed("code", held_out)]
    learns = {"first": ("docstrings", 0), "code": ("packages", 1), "twin": ("docstrings", 2)}
    wanted = {"first"} | {BESIDE[form] for form in size.taps if form in BESIDE}
    bases, bits = {}, {}
    for name, (text, seed) in learns.items():
        if name not in wanted:
            continue
        model = untrained_model(dict(size.model), seed).to(device, dtype)
        plan = plan_of(size.base_steps, size.base_rows * size.row_tokens, 2)
        bits[name] = pretrain(model, Mixture([texts[text]], [1.0], size.base_rows, seed), judged, plan, size.base_rate)
        bases[name] = {key: t.cpu() for key, t in model.state_dict().items()}
    to_learn = packed("code", domain)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()), "blocks": size.model["blocks"],
        "tokens": size.base_steps * size.base_rows * size.row_tokens, "bits_per_byte": bits,
        "text_tokens": {n: int(t.tokens_RT.size) for n, t in (texts | {"to_learn": to_learn}).items()},
    }  # fmt: skip
    return {
        "bases": bases, "device": device.type, "dtype": dtype, "text": (to_learn, judged[1]), "size": asdict(size),
        "facts": facts,
    }  # fmt: skip


def read_ground(kept: Mapping[str, Any]) -> Ground:
    """The bases are not compiled: taps are hooks."""
    size = Size(**kept["size"])
    bases = {name: model_of(weights, size.model, 0, kept).eval() for name, weights in kept["bases"].items()}
    return Ground(bases, *kept["text"], size, kept["facts"])


@dataclass(frozen=True, slots=True)
class Run:
    """One branch, trained: its held-out bits per byte, those by which a rate is chosen (of other rows), its parameters,
    what its softmax weights became."""

    bits: float
    choosing_bits: float
    parameters: int
    shares: list[float]


def one(ground: Ground, form: str, rate: float, seed: int) -> dict[str, Any]:
    """A `Run`, as it is kept."""
    size = ground.size
    bases = [ground.bases["first"], *([ground.bases[BESIDE[form]]] if form in BESIDE else [])]
    made = learner(bases, form, size, rate, seed)
    plan = plan_of(size.steps, size.rows * size.row_tokens, 2)
    mixture = Mixture([ground.domain], [1.0], size.rows, seed)
    learn(made, mixture, [ground.held_out], plan, f"{form}, rate {rate:g}, seed {seed}")
    count = min(size.held_out_rows, len(ground.held_out) // 2)
    judged = [bits(made, ground.held_out, rows) for rows in (range(count), range(count, 2 * count))]
    weights = [t for n, t in made.engine.trained().items() if n in ("tap_weights", "base_weights")]
    shares = [round(float(share), 4) for w in weights for share in w.float().softmax(0)]
    return asdict(Run(*judged, made.parameters, shares))


def bits(made: Learner, text: Packed, rows: Sequence[int]) -> float:
    """Per byte of these rows."""
    loss = made.engine.evaluate([text.batch(rows[i : i + 16]) for i in range(0, len(rows), 16)])
    return float(loss.mean / math.log(2) / text.bytes_per_token)


def all_runs(trainings: Trainings, size: Size) -> dict[str, tuple[dict[float, float], list[Run]]]:
    """Form -> (losses of the rates tried on seed 0, the runs of every seed at the best)."""

    def call(form: str, rate: float, seed: int) -> tuple[Any, ...]:
        return f"{form}/{rate:g}/{seed}", one, form, rate, seed

    def runs(form: str) -> tuple[dict[float, float], list[Run]]:
        trainings.ahead(*(call(form, rate, 0) for rate in size.rates))
        tried = {rate: Run(**trainings.of(*call(form, rate, 0))) for rate in size.rates}
        rate = min(tried, key=lambda r: tried[r].choosing_bits)
        others = [call(form, rate, seed) for seed in range(1, size.seeds)]
        trainings.ahead(*others)
        found = [tried[rate], *(Run(**trainings.of(*other)) for other in others)]
        return {rate: run.choosing_bits for rate, run in tried.items()}, found

    return dict(zip(size.taps, trainings.each(runs, size.taps), strict=True))


def report(found: Mapping[str, tuple[dict[float, float], list[Run]]], size: Size) -> dict[str, Any]:
    """Losses with intervals over the seeds; what each form gains over the plain one."""
    forms, gains = {}, {}
    plain = [run.bits for run in found["final"][1]]
    for form, (tried, runs) in found.items():
        forms[form] = {
            "taps": list(size.taps[form]), "parameters": runs[0].parameters, "rates_tried": tried,
            "bits_per_byte": interval([run.bits for run in runs]),
            "shares": [round(statistics.mean(s), 4) for s in zip(*(run.shares for run in runs), strict=True)],
        }  # fmt: skip
        if form != "final":
            saved = [before - run.bits for before, run in zip(plain, runs, strict=True)]
            gains[form] = interval(saved) | {"per_seed": [round(s, 5) for s in saved]}
            gains[form]["verdict"] = verdict(gains[form])
    return {"forms": forms, "gains": gains}


def verdict(gain: Mapping[str, Any]) -> str:
    """In one word."""
    if gain["low"] > 0:
        return "shown"
    return "refuted" if gain["high"] < 0 else "undecided"


def main(arguments: Sequence[str]) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="some seconds on a CPU: that it runs, not what is true")
    parser.add_argument("--forms", nargs="+", default=[], help="these beside `final` (default: all)")
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    device, dtype = choose_device(chosen.device)
    size = SMALL if chosen.small else LARGE
    if chosen.forms:
        size = replace(size, taps={form: size.taps[form] for form in ("final", *chosen.forms)})
    torch.set_num_threads(CPU_THREADS)
    least = 1 + len(size.taps) * (len(size.rates) + size.seeds - 1)
    with work_folder(chosen.work, Path(__file__).name, size, device.type) as work:
        stand_on(work, lambda: make_ground(size, device, dtype))
        with Trainings(work, read_ground, chosen.jobs, began + chosen.deadline, least) as trainings:
            facts = trainings.of("base", facts_of)
            told = report(all_runs(trainings, size), size)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    tokens = size.steps * size.rows * size.row_tokens
    print(json.dumps({"device": name, "base": facts, "seeds": size.seeds, "tokens": tokens} | told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
