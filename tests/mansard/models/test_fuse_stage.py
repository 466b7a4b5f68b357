"""The fused checkpoint answers as the trained model did, and a fusion that does not is stopped."""

from typing import Any

import pytest

from mansard.canonical import canonical_json
from mansard.errors import BadInput, StageFailed
from mansard.models.expand import apply, plan
from mansard.models.families import LLAMA
from mansard.models.model_files import model_config
from mansard.models.storeys import read_expansion
from mansard.specs.surgery import Expand, Fuse
from mansard.store.store import Store

pytestmark = pytest.mark.slow


def expansion_and_trained(make_llama: Any, store: Store) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """An expansion, its new blocks' tensors as some training left them, and that training's probe."""
    import torch

    from mansard.models.loading import load_model
    from mansard.models.probe import forward_logits, random_probe

    base = store.snapshot(make_llama(tie_word_embeddings=True))
    expansion = apply(store, base, plan(model_config(store, base), Expand(blocks=2)))
    blocks = [b.index for b in read_expansion(store, expansion).new_blocks]
    model = load_model(store.materialize(expansion), None)
    trained = {}
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = LLAMA.split(name)
            if place is not None and place[0] in blocks:
                parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype) * 0.05)
                trained[name] = parameter.detach().clone()
    input_ids_BT = random_probe(260, 2, 24, seed=3)
    return expansion, trained, {"input_ids": input_ids_BT, "logits": forward_logits(model, input_ids_BT, "cpu")}


def run(
    make_context: Any, store: Store, expansion: str, trained: dict[str, Any], probe: dict[str, Any], kernel: str = "cpu"
) -> str:
    from safetensors.torch import save

    from mansard.models import fuse_stage

    record = canonical_json({"probe": {"kernel": kernel} if kernel else {}})
    files = {"trained.safetensors": save(trained), "probe.safetensors": save(probe), "training.json": record}
    folder = make_context({}, {}).work
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return fuse_stage.run(
        make_context({"expansion": expansion, "trained": store.snapshot(folder)}, Fuse().model_dump(mode="json"))
    )


def test_fused_model_answers_as_the_trained_one(make_llama: Any, make_context: Any, store: Store) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    expansion, trained, probe = expansion_and_trained(make_llama, store)
    fused = run(make_context, store, expansion, trained, probe)
    model = AutoModelForCausalLM.from_pretrained(store.materialize(fused), dtype=torch.bfloat16)
    assert model.config.num_hidden_layers == 4
    for name, tensor in trained.items():
        assert torch.equal(model.get_parameter(name), tensor)


def test_fusion_of_other_tensors_than_the_probe_saw_is_stopped(
    make_llama: Any, make_context: Any, store: Store
) -> None:
    expansion, trained, probe = expansion_and_trained(make_llama, store)
    changed = {**trained, "model.layers.1.input_layernorm.weight": trained["model.layers.1.input_layernorm.weight"] * 2}
    with pytest.raises(StageFailed, match=r"not the trained one: logits in bfloat16 differ by up to \d") as failed:
        run(make_context, store, expansion, changed, probe)
    assert "\n" not in str(failed.value)


def test_probe_without_logits_is_refused(make_llama: Any, make_context: Any, store: Store) -> None:
    expansion, trained, probe = expansion_and_trained(make_llama, store)
    with pytest.raises(BadInput, match="no tensors input_ids and logits"):
        run(make_context, store, expansion, trained, {"input_ids": probe["input_ids"]})


def test_what_attention_the_process_prefers_changes_no_comparison(
    make_llama: Any, make_context: Any, store: Store
) -> None:
    """On Hopper training left flash attention first, where a fresh process takes cuDNN's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    expansion, trained, probe = expansion_and_trained(make_llama, store)
    with sdpa_kernel([SDPBackend.MATH]):
        assert run(make_context, store, expansion, trained, probe)


@pytest.mark.parametrize(("kernel", "message"), [
    ("", r"^training.json: no probe.kernel in it \(KeyError\('kernel'\)\); train again$"),
    ("flash", "computed by 'flash', this process runs on 'cpu'; run it where they were computed"),
])  # fmt: skip
def test_a_probe_that_cannot_be_computed_again_is_refused(
    make_llama: Any, make_context: Any, store: Store, kernel: str, message: str
) -> None:
    expansion, trained, probe = expansion_and_trained(make_llama, store)
    with pytest.raises(BadInput, match=message):
        run(make_context, store, expansion, trained, probe, kernel)
