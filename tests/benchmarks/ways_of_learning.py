"""Three ways to teach a small base something, each as an engine of the library's own loop: a branch beside its states,
LoRA on all its linears (peft), full tuning.

All start from the same base, in its type with float32 masters. A branch's states are computed by the base when a row is
first asked for and kept; those seconds are counted, and told apart. Seconds are of gradients and steps: evaluation and
data are not in them. Legend: B rows, T tokens, N = B * T, D base width.
"""

import copy
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mansard.carry_on.branch import Branch
from mansard.carry_on.flat import FlatWeights
from mansard.carry_on.head import Head
from mansard.carry_on.loader import Part
from mansard.carry_on.model import CarryOnForCausalLM
from mansard.carry_on.node_engine import BranchEngine
from mansard.carry_on.wire import Coded
from mansard.composition.shape import shape_of_size
from mansard.training.attention import segment_ends, whole_rows
from mansard.training.data import Batch, Mixture, Packed
from mansard.training.engines import LocalEngine, Loss, Objective
from mansard.training.loop import Moment, Plan, run_loop
from mansard.training.optimizer import Group, MasterAdamW, Schedule
from mansard.training.state import Checkpoints

WAYS = ("branch", "lora", "full")
WARMUP = 0.05
CLIP_NORM = 1.0
RATE_STEP = 3.0
WEIGHT_DECAY = 0.01
"""Of the base, which sees its text several times."""


class States:
    """What the base says of rows, computed once and kept where the base is. The base given here is used up: its
    attention becomes the trainer's."""

    def __init__(self, base: Any) -> None:
        self._objective = Objective(base)
        self._kept_TD: dict[bytes, torch.Tensor] = {}
        self.seconds = 0.0

    def parts(self, batch: Batch) -> list[Part]:
        """The whole batch as one piece."""
        rows = list(zip(batch.tokens_BT, batch.positions_BT, strict=True))
        missing = [i for i, row in enumerate(rows) if _key(*row) not in self._kept_TD]
        if missing:
            self._capture(Batch(*(t[missing] for t in (batch.tokens_BT, batch.positions_BT, batch.labels_BT))))
        states_ND = torch.cat([self._kept_TD[_key(*row)] for row in rows])
        return [Part(slice(0, len(states_ND)), Coded(states_ND), torch.empty(0, dtype=torch.int64), batch.positions_BT)]

    def forget(self) -> None:
        self._kept_TD.clear()
        self.seconds = 0.0

    def _capture(self, batch: Batch) -> None:
        begun = time.perf_counter()
        ordered = batch.whole_first()
        with torch.no_grad():
            states_BTD = self._objective.hidden(ordered)
        for tokens, positions, states_TD in zip(ordered.tokens_BT, ordered.positions_BT, states_BTD, strict=True):
            self._kept_TD[_key(tokens, positions)] = states_TD
        wait(states_BTD.device)
        self.seconds += time.perf_counter() - begun


@dataclass(slots=True)
class Learner:
    """One way, ready to learn. `model` answers with what has been learned; `parameters` are those that train."""

    engine: Any
    model: Any
    parameters: int
    states: States | None = None


def learner(way: str, base: Any, budget: int, rate: float, seed: int) -> Learner:
    """`budget`: the most parameters that a branch or LoRA trains."""
    if way == "branch":
        return _branch(base, budget, rate, seed)
    model = copy.deepcopy(base)
    if way == "lora":
        _inject_lora(model, budget, seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    engine = LocalEngine(model, [Group(way, rate, trained)], 0.0, CLIP_NORM)
    engine.objective.decoder.compile()  # on a GPU, as the trainer does
    return Learner(engine, model, sum(p.numel() for p in trained.values()))


def _branch(base: Any, budget: int, rate: float, seed: int) -> Learner:
    weight_VD = base.get_output_embeddings().weight.detach()
    branch = Branch(shape_of_size(weight_VD.shape[1], budget))
    branch.start(seed)
    branch.to(weight_VD.device, weight_VD.dtype)
    weights, states = FlatWeights(branch), States(copy.deepcopy(base))
    optimizer = MasterAdamW([Group("branch", rate, weights.parameters)], 0.0)
    head = Head(weight_VD.cpu(), weight_VD.device, weight_VD.dtype)
    engine = BranchEngine(weights, head, states, optimizer, 1.0, CLIP_NORM)
    model = CarryOnForCausalLM(copy.deepcopy(base), branch, 1.0)
    return Learner(engine, model, branch.shape.parameters, states)


def _inject_lora(model: Any, budget: int, seed: int) -> None:
    """The highest rank that `budget` allows, on every linear of every block, in the base's type."""
    from peft import LoraConfig, inject_adapter_in_model

    linears = {n: m for n, m in model.get_decoder().layers.named_modules() if isinstance(m, nn.Linear)}
    rank = budget // sum(m.in_features + m.out_features for m in linears.values())
    if rank == 0:
        raise SystemExit(f"{budget:,} parameters are below LoRA's rank 1 on every linear of this base; raise them")
    targets = sorted({name.rsplit(".", 1)[-1] for name in linears})
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets), model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(model.dtype)


@dataclass(frozen=True, slots=True)
class Point:
    """`seconds` of learning until here, `capture_seconds` of them the base's; `loss` of the last step, in nats."""

    tokens: int
    seconds: float
    capture_seconds: float
    loss: float
    bits_per_byte: dict[str, float]


class Clocked:
    """An engine that knows how long its gradients and steps have taken."""

    def __init__(self, learner: Learner) -> None:
        self._engine = learner.engine
        self._states = learner.states
        self.seconds = self.capture_seconds = 0.0
        self.evaluate, self.state = learner.engine.evaluate, learner.engine.state
        self.load_state = learner.engine.load_state

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def gradients(self, batch: Batch) -> Loss:
        captured, begun = self._captured(), time.perf_counter()
        loss: Loss = self._engine.gradients(batch)
        self._count(begun)
        self.capture_seconds += self._captured() - captured
        return loss

    def step(self, factor: float) -> float:
        begun = time.perf_counter()
        norm: float = self._engine.step(factor)
        self._count(begun)
        return norm

    def warm(self, batches: Sequence[Batch]) -> None:
        """What happens once a process (compilations, workspaces; CUDA graphs, recorded the second time) happens now,
        and nothing else does."""
        for batch in (*batches, *batches):
            self._engine.gradients(batch)
        for parameter in self._parameters():
            parameter.grad = None
        if self._states is not None:
            self._states.forget()

    def _parameters(self) -> Sequence[nn.Parameter]:
        return [] if self._states is not None else list(self._engine.objective.model.parameters())

    def _captured(self) -> float:
        return 0.0 if self._states is None else self._states.seconds

    def _count(self, begun: float) -> None:
        wait(self.device)
        self.seconds += time.perf_counter() - begun


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def learn(learner: Learner, mixture: Any, held_out: Sequence[Packed], plan: Plan, what: str) -> list[Point]:
    """The curve on held-out text (empty without any), from before the first step."""
    engine = Clocked(learner)
    engine.warm(kinds(mixture, plan.schedule.steps))
    points: list[Point] = []

    def report(moment: Moment) -> None:
        if moment.bits_per_byte or moment.step % plan.evaluate_every_steps == 0:
            spent = (engine.seconds, engine.capture_seconds)
            points.append(Point(moment.tokens, *spent, moment.loss, moment.bits_per_byte))
            bits = "".join(f", {name} {value:.4f} bits/byte" for name, value in moment.bits_per_byte.items())
            tell(f"{what}: step {moment.step} of {moment.steps}, {engine.seconds:.1f} s, loss {moment.loss:.4f}{bits}")

    with tempfile.TemporaryDirectory() as folder:
        cursor = run_loop(engine, mixture, held_out, plan, Checkpoints(Path(folder)), report)
    return [Point(0, 0.0, 0.0, math.nan, cursor.curve[0]["bits_per_byte"]), *points]


def kinds(mixture: Any, steps: int) -> list[Batch]:
    """A batch of every kind that compiled blocks tell apart (by how many segments there are, attention.py)."""
    found: dict[tuple[bool, int], Batch] = {}
    for step in range(steps):
        batch = mixture.batch(step)
        is_whole = whole_rows(batch.positions_BT) == len(batch.positions_BT)
        found.setdefault((is_whole, len(segment_ends(batch.positions_BT))), batch)
    return list(found.values())


Result = TypeVar("Result")


def choose_rate(
    rates: Sequence[float], most: int, run: Callable[[float], tuple[float, Result]]
) -> tuple[dict[float, float], float, Result]:
    """(what each rate scored, the rate with the lowest score, its result). While that one is the highest or the lowest
    of those tried, a next one is tried beyond it, up to `most` in all."""
    results = {rate: run(rate) for rate in rates}
    while True:
        best = min(results, key=lambda rate: results[rate][0])
        is_edge = best in (min(results), max(results))
        if not is_edge or len(results) >= most:
            return {rate: score for rate, (score, _) in sorted(results.items())}, best, results[best][1]
        further = best / RATE_STEP if best == min(results) else best * RATE_STEP
        results[further] = run(further)


def plan_of(steps: int, tokens_per_step: int, evaluations: int) -> Plan:
    """Without checkpoints."""
    return Plan(Schedule(steps, round(steps * WARMUP)), tokens_per_step, max(steps // evaluations, 1), steps + 1)


def pretrain(model: Any, mixture: Mixture, held_out: Sequence[Packed], plan: Plan, rate: float) -> Mapping[str, float]:
    """Trains `model` in place; its bits per byte at the end."""
    engine = LocalEngine(model, [Group("base", rate, dict(model.named_parameters()))], WEIGHT_DECAY, CLIP_NORM)
    engine.objective.decoder.compile()
    found = learn(Learner(engine, model, 0), mixture, held_out, plan, "base")[-1].bits_per_byte
    model.set_attn_implementation("sdpa")
    return found


def choose_device(name: str) -> tuple[torch.device, torch.dtype]:
    """bf16 on a GPU, float32 on the CPU."""
    if name == "cpu":
        return torch.device("cpu"), torch.float32
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is there; --device cpu --small runs a smaller form on the CPU")
    return torch.device("cuda", 0), torch.bfloat16


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _key(tokens_T: torch.Tensor, positions_T: torch.Tensor) -> bytes:
    return bytes(tokens_T.numpy().tobytes() + positions_T.numpy().tobytes())
