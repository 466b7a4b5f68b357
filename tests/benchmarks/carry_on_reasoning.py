"""What a branch of 1 MB learns from 1,000 worked answers: arithmetic in several steps, exact match before and after.

A small base learns documentation, single sums and questions of one step (worked_arithmetic.py), character by character;
with `--base chains` also sums that hang together, in another notation, so that the samples only teach how to ask for
what it can do. Then 1,000 samples with their steps worked out are learned by a branch of at most 500,000 parameters
(1 MB in bf16) on the base's states, and by LoRA with as many. Problems asked afterwards were in no sample; answers are
greedy; the number after the last "so", or else the last one, counts. Before: the base alone, asked the same way, and
with two worked examples before the question. The rate of each way is the best of those tried on seed 0 (three, and
further ones while the best is at the edge), by problems of neither part. Shares come with Wilson's interval of 95 %,
seed by seed; `seconds` of a run are counted from some steps measured alone (pace.py). `--jobs` runs several trainings
at a time, `--work` keeps what is done. Prints one JSON line last.
"""

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from carry_on_learning import facts_of, least_runs, model_of, read_text
from learning_curves import interval
from pace import STEPS as PACE_STEPS
from pace import Pace, measured
from side_by_side import Trainings, add_arguments, stand_on, work_folder
from ways_of_learning import Learner, Point, choose_device, choose_rate, learn, learner, plan_of, pretrain, tell
from worked_arithmetic import LARGEST, STEPS, Problem, answer_in, known_lines, problems, sum_of

from mansard.carry_on.branch_file import branch_bytes
from mansard.composition.description import BranchDescription
from mansard.demo.base import train_tokenizer, untrained_model
from mansard.evaluation.score_interval import wilson_interval
from mansard.training.data import Batch, Mixture, pack_texts
from mansard.training.engines import CPU_THREADS
from mansard.training.packing import IGNORED, labels_of

WAYS = ("branch", "lora")
CHARACTERS = 258
"""Every byte, beginning and end: no token is longer than a character."""
PARAMETERS = 500_000
ONE_SIDED = 0.025
TIES = 1e-6
"""Where rates have equally many right, the lower training loss decides."""
SAMPLES_SEED, CHECK_SEED, ASKED_SEED = 1, 2, 3
EXAMPLES = 2


@dataclass(frozen=True, slots=True)
class Size:
    model: Mapping[str, int]
    files: int
    row_tokens: int
    sums_lines: int
    base_rows: int
    base_steps: int
    base_rate: float
    parameters: int
    samples: int
    rows: int
    epochs: int
    rates: Mapping[str, Sequence[float]]
    most_rates: int
    seeds: int
    checked: int
    asked: int


LARGE = Size(
    model={"vocabulary": CHARACTERS, "hidden": 384, "intermediate": 1024, "blocks": 6, "heads": 6, "max_tokens": 512},
    files=10_000, row_tokens=256, sums_lines=400_000, base_rows=64, base_steps=2500, base_rate=1e-3,
    parameters=PARAMETERS, samples=1000, rows=32, epochs=30, seeds=3, checked=200, asked=1000,
    rates={"branch": (5e-4, 1.5e-3, 5e-3), "lora": (5e-4, 1.5e-3, 5e-3)}, most_rates=5,
)  # fmt: skip
SMALL = Size(
    model={"vocabulary": CHARACTERS, "hidden": 64, "intermediate": 128, "blocks": 2, "heads": 1, "max_tokens": 512},
    files=20, row_tokens=128, sums_lines=1000, base_rows=8, base_steps=30, base_rate=3e-3,
    parameters=40_000, samples=32, rows=8, epochs=3, seeds=2, checked=8, asked=16,
    rates={"branch": (3e-3, 1e-2), "lora": (3e-3, 1e-2)}, most_rates=2,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ground:
    """The base, and the problems: worked ones to learn, those by which rates are chosen, those that are reported."""

    base: Any
    tokenizer: Any
    worked: list[Problem]
    checked: list[Problem]
    asked: list[Problem]
    size: Size
    facts: dict[str, Any]


def make_ground(size: Size, with_chains: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A ground as it is kept: the base as its weights, the device by name."""
    documents = [d.text for d in read_text(size.files)[0]]
    tokenizer = train_tokenizer(documents[:1], CHARACTERS, size.model["max_tokens"])
    text = pack_texts("docstrings", documents, tokenizer, size.row_tokens, 0)
    _, checked, asked = all_problems(size)
    lines = known_lines(size.sums_lines, 0, with_chains, [*checked, *asked])
    sums = pack_texts("sums", lines, tokenizer, size.row_tokens, 0)
    model = untrained_model(dict(size.model), 0).to(device, dtype)
    plan = plan_of(size.base_steps, size.base_rows * size.row_tokens, 5)
    bits = pretrain(model, Mixture([text, sums], [0.3, 0.7], size.base_rows, 0), [], plan, size.base_rate)
    return {
        "weights": {name: t.cpu() for name, t in model.state_dict().items()}, "device": device.type, "dtype": dtype,
        "tokenizer": tokenizer, "size": asdict(size),
        "facts": {"parameters": sum(p.numel() for p in model.parameters()), "tokens": plan.tokens, **bits},
    }  # fmt: skip


def all_problems(size: Size) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """To learn, to choose rates by, to report."""
    worked = problems(size.samples, SAMPLES_SEED)
    checked = problems(size.checked, CHECK_SEED, without=worked)
    return worked, checked, problems(size.asked, ASKED_SEED, without=[*worked, *checked])


def read_ground(kept: Mapping[str, Any]) -> Ground:
    size = Size(**kept["size"])
    base = model_of(kept["weights"], size.model, 0, kept)
    return Ground(base, kept["tokenizer"], *all_problems(size), size, kept["facts"])


class Samples:
    """Batches of worked answers, one a row; only what follows the prompt is learned. They come again every epoch in
    another order."""

    def __init__(self, worked: Sequence[Problem], tokenizer: Any, rows: int, seed: int) -> None:
        ids = [(encode(tokenizer, p.prompt), encode(tokenizer, p.prompt + p.solution)) for p in worked]
        tokens = max(len(whole) for _, whole in ids)
        self.tokens_RT = torch.full((len(ids), tokens), tokenizer.eos_token_id)
        self._positions_T = torch.arange(tokens)
        self._labels_RT = torch.full_like(self.tokens_RT, IGNORED)
        for row, (prompt, whole) in enumerate(ids):
            self.tokens_RT[row, : len(whole)] = torch.tensor(whole)
            labels_1T = labels_of(self.tokens_RT[row : row + 1], self._positions_T[None])
            answer = slice(len(prompt) - 1, len(whole) - 1)
            self._labels_RT[row, answer] = labels_1T[0, answer]
        self._rows = rows
        self._seed = seed
        self.steps_per_epoch = len(ids) // rows

    @property
    def tokens_per_step(self) -> int:
        return self._rows * int(self.tokens_RT.shape[1])

    def batch(self, step: int) -> Batch:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.tokens_RT), generator=torch.Generator().manual_seed(1000 * self._seed + epoch))
        picked = order[place * self._rows : (place + 1) * self._rows]
        return Batch(self.tokens_RT[picked], self._positions_T.repeat(len(picked), 1), self._labels_RT[picked])


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> list[str]:
    """Greedy, to the line's end, by a copy whose blocks are not compiled: every token would be another size."""
    model = copy.deepcopy(model).eval()
    getattr(model, "base", model).set_attn_implementation("sdpa")
    ids = [encode(tokenizer, p) for p in prompts]
    longest, pad = max(map(len, ids)), tokenizer.eos_token_id
    stops = [pad, encode(tokenizer, "\n")[-1]]
    made: list[str] = []
    for first in range(0, len(ids), 500):
        some = ids[first : first + 500]
        asked = torch.tensor([[pad] * (longest - len(i)) + i for i in some], device=model.device)
        mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in some], device=model.device)
        found = model.generate(
            asked, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=pad
        )
        made += tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
    return made


def score(model: Any, tokenizer: Any, asked: Sequence[Problem], before: str = "") -> dict[str, Any]:
    """Exact match over all problems and by their number of steps."""
    new_tokens = max(len(p.solution) for p in asked) + 8
    found = answers(model, tokenizer, [before + p.prompt for p in asked], new_tokens)
    right = [answer_in(text) == p.answer for text, p in zip(found, asked, strict=True)]
    by_steps = {n: [r for r, p in zip(right, asked, strict=True) if len(p.steps) == n] for n in STEPS}
    low, high = wilson_interval(sum(right) / len(right), len(right), ONE_SIDED)
    return {
        "exact_match": round(sum(right) / len(right), 4), "low": round(low, 4), "high": round(high, 4),
        "by_steps": {n: round(sum(r) / len(r), 4) for n, r in by_steps.items() if r}, "example": found[0].strip(),
    }  # fmt: skip


def single_sums(model: Any, tokenizer: Any, count: int) -> float:
    """Share of single sums that the base completes rightly."""
    draw = random.Random(CHECK_SEED)
    values = [draw.randrange(LARGEST + 1) for _ in range(count)]
    sums = [(value, *sum_of(value, draw)) for value in values]
    found = answers(model, tokenizer, [f"{v}{sign}{operand}=" for v, sign, operand, _ in sums], 4)
    right = sum(text.split(";")[0].strip() == str(s[3]) for text, s in zip(found, sums, strict=True))
    return round(right / count, 4)


def before(ground: Ground) -> dict[str, Any]:
    """What the base alone can do."""
    base, tokenizer, asked = ground.base, ground.tokenizer, ground.asked
    examples = "".join(p.prompt + p.solution for p in ground.worked[:EXAMPLES])
    return {
        "single_sums_right": single_sums(base, tokenizer, max(ground.size.asked, 16)),
        "asked_alike": score(base, tokenizer, asked), "after_examples": score(base, tokenizer, asked, examples),
    }  # fmt: skip


def taught(ground: Ground, way: str, rate: float, seed: int) -> dict[str, Any]:
    """What one that has learned gets right, of the problems to choose by and of those that are reported."""
    size, tokenizer = ground.size, ground.tokenizer
    made = learner(way, ground.base, size.parameters, rate, seed)
    samples = Samples(ground.worked, tokenizer, size.rows, seed)
    plan = plan_of(size.epochs * samples.steps_per_epoch, samples.tokens_per_step, 3)
    last = learn(made, samples, [], plan, f"{way}, rate {rate:g}, seed {seed}")[-1]
    return {
        "checked": score(made.model, tokenizer, ground.checked)["exact_match"], "loss": last.loss,
        "asked": score(made.model, tokenizer, ground.asked), "parameters": made.parameters, **file_bytes(made),
    }  # fmt: skip


def seconds_of(ground: Ground, way: str) -> dict[str, Any]:
    """Of a whole run."""
    size = ground.size
    made = learner(way, ground.base, size.parameters, size.rates[way][0], 0)
    samples = Samples(ground.worked, ground.tokenizer, size.rows, 0)
    tokens, rows = samples.tokens_per_step, len(samples.tokens_RT)
    pace: Pace = measured(made, samples, tokens, size.rows, rows, way)
    end = Point(size.epochs * samples.steps_per_epoch * tokens, 0.0, 0.0, 0.0, {})
    return {"seconds": pace.timed([end], tokens, size.rows, rows)[0].seconds}


def run_way(trainings: Trainings, way: str, size: Size) -> dict[str, Any]:
    """Rates tried on seed 0, then every seed at the one taken."""

    def call(rate: float, seed: int) -> tuple[Any, ...]:
        return f"{way}/{rate:g}/{seed}", taught, way, rate, seed

    def run(rate: float) -> tuple[float, dict[str, Any]]:
        found = trainings.of(*call(rate, 0))
        tell(f"{way}: rate {rate:g}: {found['checked']:.1%} of {size.checked} right")
        return -found["checked"] + TIES * found["loss"], found

    trainings.ahead(*(call(rate, 0) for rate in size.rates[way]))
    tried, rate, first = choose_rate(size.rates[way], size.most_rates, run)
    others = [call(rate, seed) for seed in range(1, size.seeds)]
    trainings.ahead(*others)
    after = [found["asked"] for found in (first, *(trainings.of(*other) for other in others))]
    for seed, found in enumerate(after):
        tell(f"{way}, seed {seed}: {found}")
    return {
        **{key: first[key] for key in ("parameters", "file_bytes") if key in first},
        "right_by_rate": {r: round(-score, 4) for r, score in tried.items()}, "rate": rate,
        "is_rate_at_edge": rate in (min(tried), max(tried)), "after": after,
        "over_seeds": interval([found["exact_match"] for found in after]),
    }  # fmt: skip


def file_bytes(made: Learner) -> dict[str, int]:
    """Of a branch as it is saved; nothing for others."""
    if made.states is None:
        return {}
    branch = made.model.branch
    description = BranchDescription("0" * 64, branch.shape, 1.0)
    return {"file_bytes": len(branch_bytes(description, dict(branch.named_parameters()), torch.bfloat16))}


def main(arguments: Sequence[str]) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="some seconds on a CPU: that it runs, not what is true")
    parser.add_argument("--base", choices=("sums", "chains"), default="sums", help="what it knows beforehand")
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    device, dtype = choose_device(chosen.device)
    size = SMALL if chosen.small else LARGE
    torch.set_num_threads(CPU_THREADS)
    with work_folder(chosen.work, Path(__file__).name, size, chosen.base, device.type) as work:
        stand_on(work, lambda: make_ground(size, chosen.base == "chains", device, dtype))
        least = 1 + least_runs(size, WAYS)
        with Trainings(work, read_ground, chosen.jobs, began + chosen.deadline, least) as trainings:
            trainings.ahead(("before", before))
            facts = trainings.of("base", facts_of)
            ways = dict(zip(WAYS, trainings.each(lambda way: run_way(trainings, way, size), WAYS), strict=True))
            known = dict(trainings.of("before", before))
            for way, found in ways.items():
                found["seconds"] = round(trainings.alone(f"pace/{way}", seconds_of, way)["seconds"], 1)
    facts = facts | {"single_sums_right": known.pop("single_sums_right")}
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    told = {"device": name, "torch": torch.__version__, "base_knows": chosen.base, "base": facts}
    told |= {"samples": size.samples, "epochs": size.epochs, "asked": size.asked, "jobs": chosen.jobs}
    told |= {"seconds_are": f"counted from at most {PACE_STEPS} steps alone"}
    print(json.dumps(told | {"before": known, "ways": ways}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
