"""The branch's shape, its first moments, and base and branch as one Hugging Face model."""

from pathlib import Path
from typing import Any

import pytest

from mansard.composition.shape import grain_of, shape_of, shape_of_size
from mansard.errors import BadInput

pytestmark = pytest.mark.slow


def made_branch(width: int = 64, blocks: int = 2, seed: int = 0, is_trained: bool = True) -> Any:
    import torch

    from mansard.carry_on.branch import Branch

    branch = Branch(shape_of(128, width, blocks))
    branch.start(seed)
    if is_trained:  # a branch that has learnt: f is no longer zero
        with torch.no_grad():
            branch.output.copy_(torch.randn(branch.output.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    return branch


@pytest.mark.parametrize(("base_width", "parameters"), [(1536, 500_000), (3584, 500_000), (5120, 100_000_000)])
def test_the_widest_branch_within_a_budget_is_found(base_width: int, parameters: int) -> None:
    shape = shape_of_size(base_width, parameters)
    wider = shape_of(base_width, shape.width + grain_of(shape.width), 2)
    assert shape.parameters <= parameters < wider.parameters
    assert shape.head_width in (64, 128)


def test_a_budget_below_the_narrowest_branch_is_refused() -> None:
    with pytest.raises(BadInput, match="have at least"):
        shape_of_size(5120, 10_000)


def test_the_shape_counts_the_parameters_that_the_branch_has() -> None:
    branch = made_branch()
    assert sum(p.numel() for p in branch.parameters()) == branch.shape.parameters


def test_an_untrained_branch_adds_nothing_and_its_first_step_reaches_f_alone() -> None:
    import torch

    from mansard.carry_on.branch import packed_mask

    branch = made_branch(is_trained=False)
    x_BTD, positions_BT = torch.randn(2, 5, 128), torch.arange(5).expand(2, -1)
    delta_BTD = branch(x_BTD, positions_BT, packed_mask(positions_BT))
    assert torch.equal(delta_BTD, torch.zeros_like(delta_BTD))
    (delta_BTD * torch.randn_like(delta_BTD)).sum().backward()
    moved = {name for name, p in branch.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert moved == {"output"}


def test_every_parameter_learns_from_the_second_step_on() -> None:
    import torch

    from mansard.carry_on.branch import packed_mask

    branch = made_branch(is_trained=False)
    x_BTD, positions_BT = torch.randn(2, 5, 128), torch.arange(5).expand(2, -1)
    target = torch.randn(2, 5, 128)
    for _ in range(2):
        branch.zero_grad()
        (branch(x_BTD, positions_BT, packed_mask(positions_BT)) * target).sum().backward()
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter -= 0.1 * parameter.grad
    assert all(bool(p.grad.abs().sum() > 0) for p in branch.parameters())


def test_at_alpha_zero_the_model_computes_the_bases_logits_bit_for_bit(base_model: Any) -> None:
    import torch

    from mansard.carry_on.model import CarryOnForCausalLM

    model = CarryOnForCausalLM(base_model, made_branch(), 0.0).eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, base_model(tokens).logits)
        model.alpha = 1.0
        assert not torch.equal(model(tokens).logits, base_model(tokens).logits)


def test_generation_with_the_branchs_cache_is_generation_without(base_model: Any) -> None:
    import torch

    from mansard.carry_on.model import CarryOnForCausalLM

    model = CarryOnForCausalLM(base_model, made_branch(), 1.0).eval()
    prompt = torch.tensor([[5, 9, 33, 7], [8, 8, 21, 4]])
    cached = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    whole = prompt
    with torch.no_grad():
        for _ in range(12):
            whole = torch.cat([whole, model(whole).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, whole)


def test_left_padding_changes_no_answer(base_model: Any) -> None:
    import torch

    from mansard.carry_on.model import CarryOnForCausalLM

    model = CarryOnForCausalLM(base_model, made_branch(), 1.0).eval()
    plain = torch.tensor([[5, 9, 33]])
    padded, mask = torch.tensor([[0, 0, 5, 9, 33]]), torch.tensor([[0, 0, 1, 1, 1]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = model.generate(plain, **settings)[:, 3:]
    beside = model.generate(padded, attention_mask=mask, **settings)[:, 5:]
    assert torch.equal(alone, beside)


def test_a_branch_file_is_read_back_and_refuses_another_base(tmp_path: Path) -> None:
    import torch

    from mansard.carry_on.branch_file import branch_bytes, load_branch
    from mansard.composition.description import BranchDescription

    branch = made_branch()
    description = BranchDescription("a" * 64, branch.shape, 1.0)
    path = tmp_path / "branch.safetensors"
    path.write_bytes(branch_bytes(description, dict(branch.named_parameters()), torch.float32))
    loaded, found = load_branch(path, "a" * 64)
    assert found == description
    assert all(torch.equal(p, dict(loaded.named_parameters())[n]) for n, p in branch.named_parameters())
    with pytest.raises(BadInput, match="trained on base aaaaaaaaaaaa, not on bbbbbbbbbbbb"):
        load_branch(path, "b" * 64)


def test_a_branch_that_lacks_a_tensor_or_holds_nan_is_refused(tmp_path: Path) -> None:
    import torch

    from mansard.carry_on.branch_file import branch_bytes
    from mansard.composition.description import BranchDescription

    branch = made_branch()
    description = BranchDescription("a" * 64, branch.shape, 1.0)
    tensors = {n: p.detach().clone() for n, p in branch.named_parameters()}
    with pytest.raises(BadInput, match="mixer is missing"):
        branch_bytes(description, {n: t for n, t in tensors.items() if n != "mixer"}, torch.float32)
    tensors["mixer"][0, 0] = float("nan")
    with pytest.raises(BadInput, match="mixer holds values that are not finite"):
        branch_bytes(description, tensors, torch.float32)


def test_a_half_megabyte_branch_has_a_file_of_about_one_megabyte() -> None:
    import torch

    from mansard.carry_on.branch import Branch
    from mansard.carry_on.branch_file import branch_bytes
    from mansard.composition.description import BranchDescription

    branch = Branch(shape_of_size(1536, 500_000))
    branch.start(0)
    data = branch_bytes(
        BranchDescription("a" * 64, branch.shape, 1.0), dict(branch.named_parameters()), torch.bfloat16
    )
    assert 0.8e6 < len(data) < 1.05e6
