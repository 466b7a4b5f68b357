"""On an accelerator: compiled blocks with adapters give the gradients that they give uncompiled."""

from typing import Any

import pytest
import torch

from mansard.models.families import family_of
from mansard.specs.training import LearningRates, Train
from mansard.training.adapters import train_adapters
from mansard.training.blocks import names_in
from mansard.training.data import as_batch
from mansard.training.engines import LocalEngine
from mansard.training.packing import pack
from mansard.training.preflight import preflight

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 304, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "initializer_range": 0.05, "tie_word_embeddings": False,
}  # fmt: skip


def engine(method: str, frozen: str) -> tuple[LocalEngine, Train, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    family = family_of(CONFIG)
    new = [family.block_tensor(block, name) for block in (1, 3) for name in family.block_tensors(CONFIG, block)]
    train = Train.model_validate(
        {"tokens": 2048, "batch_sequences": 8, "learning_rates": LearningRates(new_blocks=1e-3), "frozen": frozen,
         "adapter": {"method": method, "rank": 16, "alpha": 32.0}}
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="sdpa")).to("cuda", torch.bfloat16)
    groups, _ = train_adapters(model, names_in(CONFIG, new), train, torch.device("cuda", 0))
    trained = {name: p for group in groups for name, p in group.parameters.items()}
    with torch.no_grad():
        for name, parameter in trained.items():
            if ".lora_B." in name:  # starts at zero, which would keep A's gradient at zero
                parameter.normal_(std=0.05)
    return LocalEngine(model, groups, 0.0, 1.0), train, trained


@pytest.mark.parametrize(("method", "frozen"), [("lora", "bf16"), ("lora", "fp8"), ("dora", "bf16"), ("qlora", "bf16")])
def test_compiled_blocks_with_adapters_have_the_gradients_of_plain_ones(method: str, frozen: str) -> None:
    draw = torch.Generator().manual_seed(1)
    batch = as_batch(*pack([torch.randint(2, 300, (n,), generator=draw).tolist() for n in (900, 700, 600)], 256, 0))
    made = []
    for is_compiled in (False, True):
        one, train, trained = engine(method, frozen)
        if is_compiled:
            preflight(one, batch, train)
        loss = one.gradients(batch)
        made.append((loss.mean, {name: p.grad.float().cpu() for name, p in trained.items()}))
    (plain_loss, plain), (loss, compiled) = made
    assert loss == pytest.approx(plain_loss, rel=2e-2)
    for name, gradient in plain.items():
        likeness = torch.nn.functional.cosine_similarity(gradient.flatten(), compiled[name].flatten(), dim=0)
        assert gradient.any() and likeness > 0.97, name
