"""Every family, on a very small random model: surgery, proof, a training step, fusion and reload."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mansard.models.expand import apply, plan
from mansard.models.families import FAMILIES
from mansard.models.model_files import model_config, weight_files
from mansard.models.storeys import read_expansion
from mansard.specs.surgery import Expand
from mansard.store.store import Store

pytestmark = pytest.mark.slow

MakeFamily = Callable[..., Path]
ROW_TOKENS = 32
DEFAULT_RATE = 2e-4
"""LLaMA Pro's (arXiv 2401.02415, 4.1)."""


def expand(store: Store, base: str, positions: list[int]) -> str:
    return apply(store, base, plan(model_config(store, base), Expand(blocks=len(positions), positions=positions)))


def prove(make_context: Any, base: str, expansion: str) -> dict[str, Any]:
    from mansard.models import prove_stage

    context = make_context({"base": base, "expansion": expansion}, {"probe_tokens": 24, "seed": 0, "form": "logits"})
    proof: dict[str, Any] = json.loads(context.store.read_file(prove_stage.run(context), "proof.json"))
    return proof


def train_slice(steps: int, **train: Any) -> dict[str, Any]:
    source = {"name": "code", "train": "t", "held_out": "h", "weight": 1.0, "is_domain": True}
    return {
        "data": {"sources": [source], "sequence_tokens": ROW_TOKENS, "min_domain_fraction": 0.3, "seed": 0},
        "train": {
            "tokens": steps * ROW_TOKENS * 4,
            "batch_sequences": 4,
            "learning_rates": {"new_blocks": DEFAULT_RATE},
            "precision": "fp32",
            **train,
        },
    }


def tokenize(make_context: Any, model: str) -> dict[str, str]:
    from mansard.models.tokenizer_files import take_tokenizer
    from mansard.training import tokenize_stage

    store = make_context({}, {}).store
    texts = [{"text": " ".join(f"word{(i * 7 + j) % 23}" for j in range(20)), "file": "a"} for i in range(20)]
    data = store.put_files({"data.jsonl": "".join(json.dumps(t) + "\n" for t in texts).encode()})
    inputs = {"tokenizer": take_tokenizer(store, model), "data.code.train": data}
    made = tokenize_stage.run(make_context(inputs, {"sequence_tokens": ROW_TOKENS, "seed": 0}))
    return {"data.code.train": made, "data.code.held_out": made}


def train(make_context: Any, expansion: str, spec: dict[str, Any]) -> str:
    from mansard.training import stage

    return stage.run(make_context({"expansion": expansion, **tokenize(make_context, expansion)}, spec))


def fuse(make_context: Any, expansion: str, trained: str) -> str:
    from mansard.models import fuse_stage

    return fuse_stage.run(make_context({"expansion": expansion, "trained": trained}, {"method": "residual"}))


def tensors(store: Store, model: str) -> dict[str, str]:
    return {n: d for f in weight_files(store.manifest(model)).values() for n, d in f.tensors.items()}


TIED_BF16 = {"dtype": "bfloat16", "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        *((model_type, {}) for model_type in FAMILIES),
        *((model_type, TIED_BF16) for model_type in ("llama", "qwen3", "gemma3_text")),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("qwen3_moe", {"mlp_only_layers": [0], "decoder_sparse_step": 1, "attention_bias": True}),
        ("gemma2", {"tie_word_embeddings": True, "attention_bias": True, "dtype": "bfloat16"}),
    ],
)
def test_expansion_computes_base_logits_and_generation(
    model_type: str, config: dict[str, Any], make_family: MakeFamily, make_context: Any, store: Store
) -> None:
    base = store.snapshot(make_family(model_type, **config))
    expansion = expand(store, base, [0, 2])
    proof = prove(make_context, base, expansion)
    assert proof["equal"] is True and proof["reload_equal"] is True
    assert proof["types"] == (["bfloat16", "float32"] if "dtype" in config else ["float32"])
    assert read_expansion(store, expansion).new_blocks[1].index == 4


@pytest.mark.parametrize("model_type", FAMILIES)
def test_one_step_moves_little_and_the_fused_model_is_the_trained_one(
    model_type: str, make_family: MakeFamily, make_context: Any, store: Store, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load

    from mansard.models.loading import load_model
    from mansard.models.probe import are_bit_equal, forward_logits

    base = store.snapshot(make_family(model_type))
    expansion = expand(store, base, [0, 2])
    trained = train(make_context, expansion, train_slice(steps=1))
    probe = load(store.read_file(trained, "probe.safetensors"))
    before_BTV = forward_logits(load_model(store.materialize(base), None), probe["input_ids"], "cpu")
    moved = float(torch.linalg.vector_norm(probe["logits"] - before_BTV) / torch.linalg.vector_norm(before_BTV))
    print(f"{model_type}: one step moves the logits by {moved:.2%}")
    assert 0.0 < moved < 0.1

    family, config = FAMILIES[model_type], model_config(store, expansion)
    new = {b.index for b in read_expansion(store, expansion).new_blocks}
    made = load(store.read_file(trained, "trained.safetensors"))
    assert made.keys() == {family.block_tensor(b, n) for b in new for n in family.block_tensors(config, b)}
    fused = fuse(make_context, expansion, trained)
    old, now, first = tensors(store, expansion), tensors(store, fused), tensors(store, base)
    frozen = {n for n in old if (place := family.split(n)) is None or place[0] not in new}
    assert {now[n] for n in frozen} == set(first.values()) and all(now[n] == old[n] for n in frozen)
    model = load_model(store.materialize(fused), None)
    assert are_bit_equal(forward_logits(model, probe["input_ids"], "cpu"), probe["logits"])
    model.save_pretrained(tmp_path / "saved")
    assert tensors(store, store.snapshot(tmp_path / "saved")) == now


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_reach_every_new_tensor_within_two_steps_and_no_other(
    model_type: str, make_family: MakeFamily, store: Store
) -> None:
    import torch

    from mansard.models.freeze import digest_tensors
    from mansard.models.loading import load_model
    from mansard.models.slots import view
    from mansard.specs.training import LearningRates
    from mansard.training.blocks import checkpoint_names, train_only
    from mansard.training.data import Packed
    from mansard.training.engines import LocalEngine
    from mansard.training.packing import pack

    expansion = expand(store, store.snapshot(make_family(model_type)), [0, 2])
    names = checkpoint_names(store, expansion)
    model = load_model(store.materialize(expansion), torch.float32)
    groups, frozen = train_only(model, names, LearningRates(new_blocks=DEFAULT_RATE))
    stored = tensors(store, expansion)
    held = digest_tensors(model, names.parameters(names.slots.keys() - names.new))
    assert held.items() <= frozen.digests.items()
    assert {n: held[s.parameter] for n, s in names.slots.items() if s.parameter in held and s.expert is None} == {
        n: stored[n] for n, s in names.slots.items() if s.parameter in held and s.expert is None
    }
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(1, 260, (8, 100), generator=generator).tolist()
    packed = Packed("code", *pack(documents, ROW_TOKENS, None), bytes_per_token=1.0)
    parameters = dict(model.named_parameters())
    engine = LocalEngine(model, groups, 0.0, 1.0)
    reached: set[str] = set()
    for step in range(2):
        engine.gradients(packed.batch(range(step * 8, step * 8 + 8)))
        for name in names.new:
            slot = names.slots[name]
            gradient = parameters[slot.parameter].grad
            if gradient is not None and view(gradient, slot).any():
                reached.add(name)
        assert all(p.grad is None for n, p in parameters.items() if n in frozen.digests)
        engine.step(1.0)
    assert reached == names.new
    frozen.check(digest_tensors(model, frozen.digests))


def test_experts_in_memory_are_the_tensors_on_disk(make_family: MakeFamily, store: Store) -> None:
    import torch
    from safetensors.torch import load_file

    from mansard.models.loading import load_model
    from mansard.models.slots import view

    for model_type in ("mixtral", "qwen3_moe"):
        path = make_family(model_type)
        parameters = dict(load_model(path, None).named_parameters())
        on_disk = load_file(path / "model.safetensors")
        slots = {name: FAMILIES[model_type].slot(name) for name in on_disk}
        assert {s.parameter for s in slots.values()} == parameters.keys()
        assert all(torch.equal(view(parameters[s.parameter], s), on_disk[n]) for n, s in slots.items())


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma3_text"])
def test_a_second_storey_leaves_the_first_as_it_was_trained(
    model_type: str, make_family: MakeFamily, make_context: Any, store: Store
) -> None:
    first = expand(store, store.snapshot(make_family(model_type)), [1])
    below = fuse(make_context, first, train(make_context, first, train_slice(steps=2)))
    second = expand(store, below, [0, 2])
    assert prove(make_context, below, second)["equal"] is True
    trained = train(make_context, second, train_slice(steps=2))
    fused = fuse(make_context, second, trained)
    family, now, old = FAMILIES[model_type], tensors(store, fused), tensors(store, below)
    storeys = read_expansion(store, fused).storeys
    assert [[b.index for b in s.new_blocks] for s in storeys] == [[3], [1, 4]]
    report = json.loads(store.read_file(trained, "training.json"))
    stays = [n for n in now if (place := family.split(n)) is None or place[0] not in (1, 4)]
    assert {family.slot(n).parameter for n in stays} <= report["frozen"].keys()
    moved = {0: 0, 2: 1, 3: 2, 5: 3}
    for name in stays:
        place = family.split(name)
        assert now[name] == old[name if place is None else family.block_tensor(moved[place[0]], place[1])]


def test_a_base_rate_trains_experts_under_the_checkpoints_names(
    make_family: MakeFamily, make_context: Any, store: Store
) -> None:
    expansion = expand(store, store.snapshot(make_family("mixtral")), [1])
    trained = train(make_context, expansion, train_slice(steps=2, learning_rates={"new_blocks": 1e-3, "base": 1e-3}))
    report = json.loads(store.read_file(trained, "training.json"))
    assert report["frozen"] == {}
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in report["changed_base_tensors"]
    assert not [n for n in report["changed_base_tensors"] if n.startswith("model.layers.2.")]
    fused = fuse(make_context, expansion, trained)
    assert read_expansion(store, fused).storeys[0].has_trained_base


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma3_text", "qwen3_moe"])
def test_a_removed_storey_leaves_the_bases_answers(
    model_type: str, make_family: MakeFamily, make_context: Any, store: Store
) -> None:
    from mansard.models.remove_storey import remove_storey

    base = store.snapshot(make_family(model_type))
    expansion = expand(store, base, [0, 1])
    fused = fuse(make_context, expansion, train(make_context, expansion, train_slice(steps=1)))
    back = remove_storey(store, fused, 1)
    assert tensors(store, back) == tensors(store, base)
    assert (back == base) is (model_type != "qwen3_moe")  # whose config.json lists now what a step said
    assert prove(make_context, base, back)["equal"] is True


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_packed_document_has_the_logits_it_has_alone_windows_included(
    model_type: str, make_family: MakeFamily
) -> None:
    import torch

    from mansard.models.loading import load_model
    from mansard.training.packing import masks_of, pack

    model = load_model(make_family(model_type), torch.float32)
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, 260, (n,), generator=draw).tolist() for n in (20, 7, 13)]
    tokens_BT, positions_BT = (torch.from_numpy(rows).long() for rows in pack(texts, 43, 1))
    with torch.inference_mode():
        masks = masks_of(model.config, positions_BT, torch.float32)
        packed = model(input_ids=tokens_BT, position_ids=positions_BT, attention_mask=masks, use_cache=False).logits[0]
        start = 0
        for text in texts:
            alone = model(input_ids=torch.tensor([[1, *text]]), use_cache=False).logits[0]
            torch.testing.assert_close(packed[start : start + len(alone)], alone, atol=1e-4, rtol=1e-4)
            start += len(alone)


@pytest.mark.parametrize("name", ["post_attention_layernorm.weight", "post_feedforward_layernorm.weight"])
def test_a_post_norm_that_lets_something_through_fails_the_proof(
    name: str, make_family: MakeFamily, make_context: Any, store: Store
) -> None:
    from mansard.errors import StageFailed
    from mansard.store.snapshot import Manifest, TensorFile

    base = store.snapshot(make_family("gemma2"))
    expansion = expand(store, base, [1])
    manifest = store.manifest(expansion)
    file = weight_files(manifest)["model.safetensors"]
    digests = {**file.tensors, f"model.layers.2.{name}": file.tensors[f"model.layers.1.{name}"]}
    files = {**manifest.files, "model.safetensors": TensorFile(file.header, digests, file.size_bytes)}
    with pytest.raises(StageFailed, match="logits in float32 differ"):
        prove(make_context, base, store.put_manifest(Manifest(files)))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_that_transformers_writes_is_known(model_type: str) -> None:
    from transformers import AutoConfig

    from mansard.models.families import family_of

    config = AutoConfig.for_model(model_type).to_dict()
    family_of({**config, "architectures": [FAMILIES[model_type].architecture]})


def test_capped_scores_are_computed(make_family: MakeFamily) -> None:
    """torch's own attention would leave Gemma-2's cap out."""
    import torch

    from mansard.models.loading import load_model
    from mansard.models.probe import forward_logits, random_probe

    path = make_family("gemma2", attn_logit_softcapping=0.5)
    probe_BT = random_probe(260, 1, 20, 0)
    logits = [forward_logits(load_model(path, None, attention=a), probe_BT, "cpu") for a in (None, "eager", "sdpa")]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)
