"""Masters keep what a short type loses; the schedule and the clip do what they say."""

import itertools
import math

import pytest
import torch
from torch import nn

from mansard.training.adamw import stochastic_round
from mansard.training.optimizer import Group, MasterAdamW, Schedule

# The compiler's first import calls what torch itself deprecates.
COMPILES = pytest.mark.filterwarnings("ignore:::torch")


def parameter(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.full((4, 4), 1.0, dtype=dtype))


def one_step(optimizer: MasterAdamW, weight: nn.Parameter, gradient: float = 1.0, clip: float = 100.0) -> float:
    weight.grad = torch.full_like(weight, gradient)
    return optimizer.step(1.0, clip)


def test_small_steps_reach_a_bf16_weight_through_its_fp32_master() -> None:
    weight = parameter(torch.bfloat16)
    optimizer = MasterAdamW([Group("g", 1e-4, {"w": weight})], 0.0)
    for _ in range(100):
        one_step(optimizer, weight)
    master = optimizer.masters["w"]
    assert master.dtype == torch.float32
    assert master.mean().item() == pytest.approx(0.99, abs=1e-3)
    assert torch.equal(weight, master.to(torch.bfloat16))
    assert weight.mean().item() != 1.0


def test_one_small_step_moves_the_master_and_not_yet_the_bf16_weight() -> None:
    weight = parameter(torch.bfloat16)
    optimizer = MasterAdamW([Group("g", 1e-5, {"w": weight})], 0.0)
    one_step(optimizer, weight)
    assert weight.eq(1.0).all()
    assert optimizer.masters["w"].lt(1.0).all()


def test_a_float32_weight_is_its_own_master() -> None:
    weight = parameter(torch.float32)
    assert MasterAdamW([Group("g", 1e-3, {"w": weight})], 0.0).masters["w"] is weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_was_saved_continues_bit_for_bit(dtype: torch.dtype) -> None:
    weights = [parameter(dtype), parameter(dtype)]
    optimizers = [MasterAdamW([Group("g", 1e-2, {"w": w})], 0.1) for w in weights]
    for _ in range(3):
        one_step(optimizers[0], weights[0], 0.3)
    optimizers[1].load_state({name: tensor.clone() for name, tensor in optimizers[0].state().items()})
    for optimizer, weight in zip(optimizers, weights, strict=True):
        one_step(optimizer, weight, 0.7)
    assert torch.equal(weights[0], weights[1])
    states = [optimizer.state() for optimizer in optimizers]
    assert states[0].keys() == states[1].keys() == {"master/w", "exp_avg/w", "exp_avg_sq/w", "step/w"}
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_norm_before_clipping_is_told() -> None:
    weight = parameter(torch.float32)
    assert one_step(MasterAdamW([Group("g", 1e-3, {"w": weight})], 0.0), weight, 2.0, clip=1.0) == pytest.approx(8.0)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    weight = parameter(torch.float32)
    optimizer = MasterAdamW([Group("g", 1e-3, {"w": weight})], 0.0)
    assert not math.isfinite(one_step(optimizer, weight, math.inf))
    assert weight.eq(1.0).all()


def test_groups_move_at_their_own_rates() -> None:
    fast, slow = parameter(torch.float32), parameter(torch.float32)
    optimizer = MasterAdamW([Group("new", 1e-2, {"f": fast}), Group("base", 1e-4, {"s": slow})], 0.0)
    slow.grad = torch.ones_like(slow)
    one_step(optimizer, fast)
    assert (1.0 - fast.mean().item()) == pytest.approx(100 * (1.0 - slow.mean().item()), rel=1e-2)


def test_the_schedule_warms_up_and_falls_to_nothing() -> None:
    schedule = Schedule(100, 10)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert factors[-1] < 0.001
    assert Schedule(4, 0).factor(0) == 1.0


def test_stochastic_rounding_is_right_in_the_mean_and_keeps_what_bf16_holds() -> None:
    torch.manual_seed(0)
    x = torch.tensor([1.0 + 2**-9, -3.0 - 2**-9, 1e-30]).repeat(20_000, 1)
    rounded = stochastic_round(x)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double().mean(0).float(), x[0], rtol=1e-4, atol=0.0)
    assert (rounded[:, 0].unique().numel(), rounded[:, 1].unique().numel()) == (2, 2)
    held = torch.randn(1000).bfloat16()
    assert torch.equal(stochastic_round(held.float()), held)


@COMPILES
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("master", ["fp32", "stochastic_rounding"])
def test_tensors_move_at_a_rate_of_a_millionth(kind: str, master: str) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.full((64, 64), 1.0, dtype=torch.bfloat16))
    optimizer = MasterAdamW([Group("g", 1e-6, {"w": weight})], 0.0, kind, master)
    for _ in range(50):
        one_step(optimizer, weight)
    assert 1.0 - optimizer.masters["w"].float().mean().item() == pytest.approx(50e-6, rel=0.6)
    assert (optimizer.masters["w"] is weight) == (master == "stochastic_rounding")


@COMPILES
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_a_rounded_state_continues_bit_for_bit(kind: str) -> None:
    def moved(weight: nn.Parameter, optimizer: MasterAdamW, steps: int) -> None:
        for _ in range(steps):
            weight.grad = torch.randn(64, 64).bfloat16()
            optimizer.step(1.0, 1.0)

    torch.manual_seed(0)
    weights = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
    optimizers = [MasterAdamW([Group("g", 1e-3, {"w": w})], 0.1, kind, "stochastic_rounding") for w in weights]
    moved(weights[0], optimizers[0], 3)
    kept = {name: tensor.clone() for name, tensor in optimizers[0].state().items()}
    generator = torch.get_rng_state()
    moved(weights[0], optimizers[0], 2)
    torch.set_rng_state(generator)
    optimizers[1].load_state(kept)
    moved(weights[1], optimizers[1], 2)
    assert torch.equal(weights[0], weights[1])
    eight = {"exp_avg.codes/w", "exp_avg.scale/w", "exp_avg_sq.codes/w", "exp_avg_sq.scale/w"}
    moments = eight if kind == "adamw_8bit" else {"exp_avg/w", "exp_avg_sq/w"}
    assert kept.keys() == moments | {"master/w", "step/w"}


@COMPILES
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("master", ["fp32", "stochastic_rounding"])
def test_what_an_optimizer_says_it_holds_is_what_a_step_leaves(kind: str, master: str) -> None:
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))  # a shape whose step is compiled already
    optimizer = MasterAdamW([Group("g", 1e-3, {"w": weight})], 0.0, kind, master)
    said = optimizer.held_bytes()
    one_step(optimizer, weight)
    left = {name: tensor.nbytes for name, tensor in optimizer.state().items() if not name.startswith("step")}
    assert said.masters == (left.pop("master/w") if master == "fp32" else 0)
    left.pop("master/w", None)
    assert said.moments == sum(left.values())
