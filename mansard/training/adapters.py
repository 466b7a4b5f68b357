"""LoRA, DoRA and QLoRA on the linears of the new blocks, through peft (Hu et al. 2021, Liu et al. 2024, Dettmers et al.
2023).

peft gets exact full names, and what it changed is compared with them: by substring it would adapt original blocks too.
Vectors of the new blocks (norms, biases) train as they are: they are few, and Gemma's blocks are silenced by two of
them, so that frozen ones would never speak. DoRA divides by the lengths of a weight's rows, so zeroed projections train
whole there. This is the one place that knows what peft calls a parameter. Does not cover experts, which transformers
holds in one parameter.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mansard.errors import BadInput, StageFailed
from mansard.models.freeze import digest_tensors, freeze_except
from mansard.specs.training import Adapter, Train
from mansard.training.blocks import Frozen, Names, groups_of
from mansard.training.frozen_linear import require_fp8
from mansard.training.linear_product import shorten
from mansard.training.optimizer import Group
from mansard.training.quantized_blocks import quantize_linears

DOWN, UP, LENGTHS = ".lora_A.default.weight", ".lora_B.default.weight", ".lora_magnitude_vector.default.weight"
"""What peft calls the parameters beside a linear: A, B, and DoRA's lengths of the rows."""
OWN = ".base_layer"
"""And the linear itself."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Names of the linears that get an adapter, and of the new blocks' parameters that train as they are."""

    linears: tuple[str, ...]
    plain: tuple[str, ...]


def plan(names: Names, adapter: Adapter) -> Plan:
    """BadInput where the new blocks have no such linears, or none of those that let them speak."""
    if any(names.slots[name].expert is not None for name in names.new):
        raise BadInput("train.adapter: experts are one stack a block and no linears; train this family without adapter")
    chosen = _chosen(names, adapter.modules)
    zeroed = {name for name in names.linears if f"{name}.weight" in names.silent}
    if zeroed and not zeroed & chosen:
        which = " or ".join(sorted({names.linears[name] for name in zeroed}))
        raise BadInput(f"train.adapter.modules: without {which} a new block adds nothing, whatever it learns; add one")
    whole = zeroed & chosen if adapter.method == "dora" else set()
    vectors = names.new - {f"{name}.weight" for name in names.linears}
    return Plan(tuple(sorted(chosen - whole)), tuple(sorted(vectors | {f"{name}.weight" for name in whole})))


def _chosen(names: Names, modules: list[str] | None) -> set[str]:
    known = set(names.linears.values())
    for module in modules or ():
        if module in known:
            continue
        what = "is no linear of the new blocks"
        if module in names.linears:
            what = "is one block's"
        elif f"{module}.weight" in names.slots:
            what = "is not of a new block, and the base stays frozen"
        raise BadInput(
            f"train.adapter.modules: {module!r} {what}; exact names within a block are expected, from "
            f"{', '.join(sorted(known))}"
        )
    return {name for name, inner in names.linears.items() if modules is None or inner in modules}


def train_adapters(
    model: Any,  # noqa: ANN401 - a transformers model; modified
    names: Names,
    train: Train,
    device: torch.device,
) -> tuple[list[Group], Frozen]:
    """What `train_only` does, where `train.adapter` is set; the model is on `device` then, wherever it was before (a
    small GPU holds a large model in 4 bits alone)."""
    assert train.adapter is not None
    wanted = plan(names, train.adapter)
    if train.frozen == "fp8":
        require_fp8(device)
    parameters = inject(model, wanted, train.adapter)
    groups = groups_of(parameters, names, train.learning_rates)
    freeze_except(model, parameters.keys())
    blocks = model.get_decoder().layers
    if train.adapter.method == "qlora":
        from mansard.training.four_bit_linear import hold_in_four_bits

        hold_in_four_bits(blocks, device)
    elif train.frozen == "fp8":
        quantize_linears(blocks, new_blocks_too=False)
    elif train.precision == "fp32":
        shorten(blocks, train.frozen == "bf16", trained=False)
    model.to(device)
    still = freeze_except(model, parameters.keys())
    return groups, Frozen(digest_tensors(model, still))


def inject(model: nn.Module, wanted: Plan, adapter: Adapter) -> dict[str, nn.Parameter]:
    """Put peft's adapters beside the wanted linears of `model` (modified), A drawn from torch's generator of the CPU;
    returns what trains, by its name now. StageFailed where peft touched anything else."""
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    original = dict(model.named_parameters())
    if adapter.method == "dora":
        _check_rows(original, wanted.linears)
    inject_adapter_in_model(_config(adapter, list(wanted.linears)), model)
    touched = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    _compare(touched, set(wanted.linears), "adapters")
    held = dict(model.named_parameters())
    is_original = {id(parameter) for parameter in original.values()}
    added = {name for name, parameter in held.items() if id(parameter) not in is_original}
    kinds = (DOWN, UP, LENGTHS) if adapter.method == "dora" else (DOWN, UP)
    _compare(added, {f"{linear}{kind}" for linear in wanted.linears for kind in kinds}, "parameters")
    plain = {_held(name, wanted.linears) for name in wanted.plain}
    return {name: held[name] for name in sorted(added | plain)}


def _config(adapter: Adapter, linears: list[str]) -> Any:  # noqa: ANN401 - peft's
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=linears, use_dora=adapter.method == "dora"
    )


def _check_rows(parameters: Mapping[str, nn.Parameter], linears: tuple[str, ...]) -> None:
    """BadInput for a row of zeros."""
    for linear in linears:
        lengths_N = parameters[f"{linear}.weight"].detach().float().norm(dim=1)
        if not lengths_N.all():
            row = int((lengths_N == 0).nonzero()[0])
            raise BadInput(
                f"train.adapter: dora divides by the lengths of a weight's rows, and row {row} of {linear} is zero; "
                "take lora, or leave it out of modules"
            )


def _compare(found: Set[str], wanted: Set[str], what: str) -> None:
    if found != wanted:
        differing = sorted(found ^ wanted)
        raise StageFailed(f"peft made other {what} than those of the new blocks, e.g. {differing[0]}")


def _held(parameter: str, linears: tuple[str, ...]) -> str:
    """Where a parameter is once peft has put its linear below an adapter."""
    module, _, kind = parameter.rpartition(".")
    return f"{module}{OWN}.{kind}" if module in linears else parameter


def merged(
    trained: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor], names: Names, adapter: Adapter
) -> dict[str, torch.Tensor]:
    """Every parameter of the new blocks as training left it, float32 where it moved: adapters merged by peft into the
    weights of the checkpoint, whose parameters are given."""
    wanted, made = plan(names, adapter), {}
    for name in names.parameters(names.new):
        linear = name.removesuffix(".weight")
        if linear in wanted.linears:
            beside = {kind: trained[f"{linear}{kind}"] for kind in (DOWN, UP, LENGTHS) if f"{linear}{kind}" in trained}
            made[name] = _merged_weight(parameters[name], beside, adapter)
        else:
            made[name] = trained.get(_held(name, wanted.linears), parameters[name])
    return made


def _merged_weight(
    weight_NK: torch.Tensor, beside: Mapping[str, torch.Tensor], adapter: Adapter
) -> torch.Tensor:
    """[N, K] in float32."""
    from peft import inject_adapter_in_model

    outputs, inputs = weight_NK.shape
    holder = nn.ModuleDict({"linear": nn.Linear(inputs, outputs, bias=False, device="meta")})
    holder["linear"].weight = nn.Parameter(weight_NK.detach().float())
    with torch.random.fork_rng(devices=()):
        inject_adapter_in_model(_config(adapter, ["linear"]), holder)
    parameters = dict(holder.named_parameters())
    with torch.no_grad():
        for kind, tensor in beside.items():
            parameters[f"linear{kind}"].copy_(tensor)
        holder["linear"].merge(safe_merge=True)
    merged_NK: torch.Tensor = holder["linear"].base_layer.weight.detach()
    return merged_NK
