"""Attention runs with the kernel that is named, whatever its process prefers."""

from types import SimpleNamespace
from typing import Any

import pytest

from mansard.errors import BadInput, StageFailed

pytestmark = pytest.mark.slow


def attention(heads: int = 4) -> Any:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    state_BHTD = torch.randn(1, heads, 24, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    return scaled_dot_product_attention(state_BHTD, state_BHTD, state_BHTD, is_causal=True)


def test_a_named_kernel_runs_whatever_the_process_prefers() -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from mansard.models.attention_kernels import attention_by

    cpu = torch.device("cpu")
    fresh = attention()
    with sdpa_kernel([SDPBackend.MATH]):
        assert not torch.equal(attention(), fresh)
        with attention_by("cpu", cpu):
            assert torch.equal(attention(), fresh)
        assert not torch.equal(attention(), fresh)


def test_on_a_cpu_every_model_is_compared_by_the_cpus_way() -> None:
    import torch

    from mansard.models.attention_kernels import choose_kernel, training_kernel

    cpu = torch.device("cpu")
    for attention_name in ("sdpa", "eager"):
        model = SimpleNamespace(device=cpu, config=SimpleNamespace(_attn_implementation=attention_name))
        assert choose_kernel(model, 24) == "cpu"
    assert training_kernel(cpu) == "cpu"
    assert training_kernel(torch.device("cuda", 0)) == "cudnn,flash,efficient,math"


def test_whether_a_kernel_takes_a_model_is_tried_with_each_of_its_masks() -> None:
    import torch

    from mansard.models.attention_kernels import _runs

    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=8)
    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16, config=config)
    runs = {kernel: _runs(kernel, model, 24) for kernel in ("cudnn", "flash", "efficient", "math")}
    assert runs == {"cudnn": False, "flash": True, "efficient": False, "math": True}  # of a CPU's torch


@pytest.mark.parametrize(("kernel", "device", "message"), [
    ("flash", "cpu", "computed by 'flash', this process runs on 'cpu'"),
    ("cpu", "cuda", "computed by 'cpu', this process runs on 'cuda'"),
    ("flesh", "cuda", "'flesh' is not one of cpu, eager, cudnn, flash, efficient, math"),
])  # fmt: skip
def test_a_kernel_of_another_device_or_of_no_name_is_refused(kernel: str, device: str, message: str) -> None:
    import torch

    from mansard.models.attention_kernels import attention_by

    with pytest.raises(BadInput, match=message), attention_by(kernel, torch.device(device)):
        pass


def test_a_kernel_that_this_torch_has_not_is_one_line() -> None:
    import torch

    from mansard.models.attention_kernels import attention_by

    message = "'efficient' was recorded, and this machine cannot run it"
    with pytest.raises(StageFailed, match=message) as failed, attention_by("efficient", torch.device("cuda")):
        attention()  # on a CPU, where torch has flash and math alone
    assert "\n" not in str(failed.value)
