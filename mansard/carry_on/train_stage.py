"""Stage `train-branch`: a branch learns on captured states. The base is never loaded: only its head's rows are opened.

Inputs: `artifact` (the base as served), `capture`; of a mixture also `artifact.1`, `capture.1` and so on: bases beside
the first, of the same tokenizer, captured on the same text. Spec: {"data", "branch", "train", "alphas"}. Makes
branch.safetensors (in bf16, as it is served) and branch.json: the curve, and held-out bits per byte of every source at
every alpha (computed with the branch as saved). Loop, data, checkpoints and resuming are those of the Pro blocks'
training.
"""

import math
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mansard.canonical import canonical_json
from mansard.carry_on.account import account, use_gpu_settings
from mansard.carry_on.branch import Branch
from mansard.carry_on.branch_file import branch_bytes
from mansard.carry_on.cached import AlignedStates, CachedStates, open_cache
from mansard.carry_on.flat import FlatWeights
from mansard.carry_on.head import Head, head_rows
from mansard.carry_on.loader import MICRO_TOKENS, Loader
from mansard.carry_on.node_engine import BranchEngine
from mansard.composition.description import FILE, BranchDescription
from mansard.composition.mixture import check_tokenizers, others_of
from mansard.composition.shape import BranchShape, shape_of, shape_of_size
from mansard.errors import BadInput
from mansard.records import SnapshotId
from mansard.specs.carry_on import Branch as BranchSpec
from mansard.specs.carry_on import BranchTrain
from mansard.specs.data import Data
from mansard.training.data import Mixture, Packed
from mansard.training.engines import CPU_THREADS
from mansard.training.loop import Plan, run_loop
from mansard.training.optimizer import Group, MasterAdamW, Schedule
from mansard.training.report import reporter
from mansard.training.state import Checkpoints

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 6
PACKAGES = ("numpy", "safetensors", "torch")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BRANCH_FILE = "branch.json"


def run(context: "StageContext") -> SnapshotId:
    data = Data.model_validate(context.spec["data"])
    train = BranchTrain.model_validate(context.spec["train"])
    torch.set_num_threads(CPU_THREADS)
    torch.manual_seed(train.seed)
    cache = open_cache(context.store, context.inputs["capture"])
    if cache.facts["base"] != context.inputs["artifact"]:
        raise BadInput(
            f"the states are of base {cache.facts['base'][:12]}, the branch is for {context.inputs['artifact'][:12]}; "
            "capture from the base that the branch will stand on"
        )
    branch_spec = BranchSpec.model_validate(context.spec["branch"])
    if tuple(branch_spec.taps) != cache.taps:
        raise BadInput(
            f"the states were captured with taps {list(cache.taps)}, branch.taps is {branch_spec.taps}; capture again"
        )
    others = _others(context)
    shape = shape_for(branch_spec, cache.width, [other.width for other in others])
    mixture, held_out = _texts(cache, data, train)
    plan = plan_of(train, data.sequence_tokens)
    use_gpu_settings()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    states = AlignedStates((cache, *others)) if others else cache
    loader = Loader(states, mixture, MICRO_TOKENS, is_pinned=device.type == "cuda")
    branch, engine = make_engine(context, loader, shape, train, device)
    _tell(context, shape, engine, plan, data.sequence_tokens)
    looped: Any = engine  # the loop's engine and mixture by their methods
    batches: Any = loader
    cursor = run_loop(looped, batches, held_out, plan, Checkpoints(context.work), reporter(context, plan))
    loader.close()
    beside = tuple(artifact for artifact, _ in others_of(context.inputs))
    description = BranchDescription(context.inputs["artifact"], shape, train.alpha, beside)
    saved = branch_bytes(description, engine.trained(), torch.bfloat16)
    with torch.no_grad():  # judged as it is served
        for name, parameter in branch.named_parameters():
            parameter.copy_(engine.trained()[name].to(torch.bfloat16))
    report = {
        "format": 1,
        "base": context.inputs["artifact"],
        "shape": shape.as_json(),
        "parameters": shape.parameters,
        "bytes": len(saved),
        "trained_alpha": train.alpha,
        "tokens": plan.tokens,
        "curve": cursor.curve,
        "alphas": alpha_curves(engine, held_out, context.spec["alphas"]),
    }
    output = context.work / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    (output / FILE).write_bytes(saved)
    (output / BRANCH_FILE).write_bytes(canonical_json(report))
    return context.store.snapshot(output)


def _others(context: "StageContext") -> list[CachedStates]:
    """The other bases' caches; BadInput where one's tokens are not the first base's, or it has taps."""
    found = others_of(context.inputs)
    if found:
        check_tokenizers(context.store, [context.inputs["artifact"], *(artifact for artifact, _ in found)])
    caches = []
    for artifact, capture in found:
        cache = open_cache(context.store, capture)
        if cache.facts["base"] != artifact or cache.taps:
            raise BadInput(
                f"capture {capture[:12]} is of base {cache.facts['base'][:12]} with taps {list(cache.taps)}; the final "
                f"states of base {artifact[:12]} alone are expected"
            )
        caches.append(cache)
    return caches


def shape_for(spec: BranchSpec, base_width: int, others: Sequence[int] = ()) -> BranchShape:
    """The shape that the spec asks for: a width, or a number of parameters."""
    if spec.width is not None:
        return shape_of(base_width, spec.width, spec.blocks, spec.taps, others)
    assert spec.parameters is not None, "the spec has one of the two"
    return shape_of_size(base_width, spec.parameters, spec.blocks, spec.taps, others)


def plan_of(train: BranchTrain, sequence_tokens: int) -> Plan:
    """Whole steps that fit the token budget; BadInput where it is below one batch."""
    tokens_per_step = train.batch_sequences * sequence_tokens
    steps = train.tokens // tokens_per_step
    if steps == 0:
        raise BadInput(f"train.tokens {train.tokens:,} is below one batch of {tokens_per_step:,} tokens; raise it")
    schedule = Schedule(steps, round(steps * train.warmup_fraction))
    return Plan(schedule, tokens_per_step, train.evaluate_every_steps, train.checkpoint_every_steps)


def make_engine(
    context: "StageContext", loader: Loader, shape: BranchShape, train: BranchTrain, device: torch.device
) -> tuple[Branch, BranchEngine]:
    """Branch, head and optimizer on the device."""
    dtype = DTYPES[train.precision]
    branch = Branch(shape)
    branch.start(train.seed)
    head = Head(head_rows(context.store, context.inputs["artifact"]), device, dtype)
    if head.width != shape.base_width:
        raise BadInput(f"the base's head has width {head.width}, its states have {shape.base_width}")
    weights = FlatWeights(branch, device, dtype)
    group = Group("branch", train.learning_rate, weights.parameters)
    optimizer = MasterAdamW([group], train.weight_decay, train.optimizer, train.master)
    return branch, BranchEngine(weights, head, loader, optimizer, train.alpha, train.clip_norm)


def alpha_curves(engine: BranchEngine, held_out: Sequence[Packed], alphas: Sequence[float]) -> list[dict[str, Any]]:
    """Held-out bits per byte of every source at every alpha; 0 is the base itself."""
    points = []
    for alpha in sorted({0.0, *alphas}):
        bits = {}
        for text in held_out:
            rows = range(len(text.tokens_RT))
            loss = engine.evaluate_at([text.batch(rows[i : i + 16]) for i in range(0, len(rows), 16)], alpha)
            bits[text.name] = loss.mean / math.log(2) / text.bytes_per_token
        points.append({"alpha": alpha, "bits_per_byte": bits})
    return points


def _texts(cache: CachedStates, data: Data, train: BranchTrain) -> tuple[Mixture, list[Packed]]:
    """The captured rows as a mixture; where the budget asks for more rows than were captured, they come again."""
    weights = {source.name: source.weight for source in data.sources}
    training = cache.texts("train")
    mixture = Mixture(training, [weights[text.name] for text in training], train.batch_sequences, data.seed)
    return mixture, cache.texts("held_out")


def _tell(context: "StageContext", shape: BranchShape, engine: BranchEngine, plan: Plan, sequence_tokens: int) -> None:
    """Parameters and the memory account, before the first step."""
    micro_tokens = max(MICRO_TOKENS, sequence_tokens)
    found = account(
        shape, engine.vocabulary, plan.tokens_per_step, micro_tokens, engine.value_bytes, engine.optimizer_bytes,
        engine.device.type == "cuda",
    )  # fmt: skip
    taps = f", reading layers {', '.join(map(str, shape.taps))} too" if shape.taps else ""
    text = f"branch of {shape.parameters:,} parameters, {shape.blocks} blocks of width {shape.width}{taps}"
    print("\n".join([f"train-branch: {text}", *found.lines()]), file=sys.stderr, flush=True)
    context.progress(0, plan.tokens, "tokens", f"{text}; expected memory {found.peak / 1e6:.0f} MB beside libraries")
