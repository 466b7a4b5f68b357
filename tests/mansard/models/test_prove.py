"""An expansion computes its base's function, bit for bit; the proof sees one that does not."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import BadInput, StageFailed
from mansard.models.expand import apply, plan
from mansard.models.model_files import model_config
from mansard.specs.surgery import Expand
from mansard.store.safetensors_header import compose_header, header_prefix
from mansard.store.snapshot import Manifest, TensorFile
from mansard.store.store import Store

pytestmark = pytest.mark.slow

SPEC = {"probe_tokens": 24, "seed": 0, "form": "auto"}


def expanded(store: Store, base: str, blocks: int, positions: Any = "even") -> str:
    return apply(store, base, plan(model_config(store, base), Expand(blocks=blocks, positions=positions)))


def prove(make_context: Any, base: str, expansion: str, **spec: Any) -> dict[str, Any]:
    from mansard.models import prove_stage

    context = make_context({"base": base, "expansion": expansion}, {**SPEC, **spec})
    proof: dict[str, Any] = json.loads(context.store.read_file(prove_stage.run(context), "proof.json"))
    return proof


def with_tensor(store: Store, model: str, name: str, content: bytes) -> str:
    """The model with other bytes in one tensor."""
    files = dict(store.manifest(model).files)
    for path, file in files.items():
        if isinstance(file, TensorFile) and name in file.tensors:
            tensors = {**file.tensors, name: store.put_bytes(content)}
            files[path] = TensorFile(file.header, tensors, file.size_bytes)
    return store.put_manifest(Manifest(files))


@pytest.mark.parametrize(
    ("config", "blocks"),
    [
        ({"num_hidden_layers": 3}, 1),
        ({"num_hidden_layers": 3}, 2),
        ({"num_hidden_layers": 3}, 3),
        ({"tie_word_embeddings": True}, 2),
        ({"attention_bias": True, "mlp_bias": True}, 2),
        ({"dtype": "float32"}, 1),
        ({"dtype": "float16", "num_key_value_heads": 4, "head_dim": 16}, 2),
    ],
)
def test_expansion_computes_base_logits_and_generation(
    config: dict[str, Any], blocks: int, make_llama: Any, make_context: Any, store: Store
) -> None:
    base = store.snapshot(make_llama(**config))
    proof = prove(make_context, base, expanded(store, base, blocks))
    assert proof["form"] == "logits" and proof["equal"] is True and proof["reload_equal"] is True
    own = config.get("dtype", "bfloat16")
    assert proof["types"] == ([own] if own == "float32" else [own, "float32"])


def test_expansion_of_an_expansion_computes_base_logits(make_llama: Any, make_context: Any, store: Store) -> None:
    base = store.snapshot(make_llama())
    second = expanded(store, expanded(store, base, 1, [0]), 2, [1, 2])
    assert prove(make_context, base, second)["equal"] is True


def test_sharded_expansion_computes_base_logits(
    make_llama: Any, make_context: Any, store: Store, tmp_path: Path
) -> None:
    from mansard.models.loading import load_model

    load_model(make_llama(), None).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    base = store.snapshot(tmp_path / "sharded")
    assert prove(make_context, base, expanded(store, base, 2))["equal"] is True


@pytest.mark.parametrize("zeroed", ["self_attn.o_proj.weight", "mlp.down_proj.weight"])
def test_block_that_adds_something_fails_the_proof(
    zeroed: str, make_llama: Any, make_context: Any, store: Store
) -> None:
    base = store.snapshot(make_llama())
    expansion = expanded(store, base, 1, [0])
    name = f"model.layers.1.{zeroed}"
    file = next(f for f in store.manifest(expansion).files.values() if isinstance(f, TensorFile))
    size_bytes = next(e.size_bytes for e in file.entries() if e.name == name)
    one_weight = b"\x00\x3f" + bytes(size_bytes - 2)  # bfloat16 0.5
    with pytest.raises(StageFailed, match=r"logits in bfloat16 differ by up to \d") as failed:
        prove(make_context, base, with_tensor(store, expansion, name, one_weight))
    assert "\n" not in str(failed.value)


def test_base_with_infinite_weights_proves_nothing(make_llama: Any, make_context: Any, store: Store) -> None:
    base = store.snapshot(make_llama())
    broken = with_tensor(store, base, "model.norm.weight", b"\x80\x7f" * 128)
    with pytest.raises(BadInput, match=r"'model.norm.weight' holds NaN or infinity"):
        prove(make_context, broken, expanded(store, broken, 1))


def test_the_structural_form_needs_no_model_in_memory_and_the_record_says_so(
    make_llama: Any, make_context: Any, store: Store
) -> None:
    base = store.snapshot(make_llama(tie_word_embeddings=True, attention_bias=True))
    proof = prove(make_context, base, expanded(store, base, 2), form="structure")
    assert (proof["form"], proof["chosen_by"], proof["equal"]) == ("structure", "spec", True)
    assert proof["tensors"] == {"kept": 2 * 13 + 2, "copied": 2 * 10, "silent": 2 * 3}
    assert "types" not in proof and "reload_equal" not in proof


def test_a_model_larger_than_memory_is_proved_by_structure(store: Store) -> None:
    from mansard.models.prove_stage import choose_form

    size_bytes = 4 << 40
    digest = "ab" * 32
    file = store.root / "objects" / digest[:2] / digest
    file.parent.mkdir(parents=True)
    with file.open("wb") as sparse:
        sparse.truncate(size_bytes)
    text, entries = compose_header({}, {"lm_head.weight": ("BF16", (1 << 20, size_bytes >> 21))})
    whole = TensorFile(text, {"lm_head.weight": digest}, len(header_prefix(text)) + entries[0].size_bytes)
    huge = store.put_manifest(Manifest({"model.safetensors": whole}))
    assert choose_form(store, huge, "auto") == ("structure", "memory")
    assert choose_form(store, huge, "logits") == ("logits", "spec")


def test_base_and_expansion_are_never_in_memory_together(make_llama: Any, make_context: Any, store: Store) -> None:
    import gc

    from mansard.models import prove_stage
    from mansard.worker import Channel

    class Watch(io.StringIO):
        def write(self, text: str) -> int:
            gc.collect()
            alive = [o for o in gc.get_objects() if type(o).__name__ == "LlamaForCausalLM"]
            seen.append(sum(bool(dict(model.named_parameters())) for model in alive) - before)
            return len(text)

    gc.collect()  # what other tests of this process left behind is no concern of ours
    alive = [o for o in gc.get_objects() if type(o).__name__ == "LlamaForCausalLM"]
    before, seen = sum(bool(dict(model.named_parameters())) for model in alive), []
    base = store.snapshot(make_llama())
    context = make_context({"base": base, "expansion": expanded(store, base, 1)}, {**SPEC, "form": "logits"})
    prove_stage.run(replace(context, channel=Channel(Watch())))
    assert len(seen) >= 5 and set(seen) == {0}, seen


def test_what_memory_there_is_follows_the_machine_and_the_control_group(tmp_path: Path) -> None:
    from mansard.models.memory import available_bytes

    group = tmp_path / "sys/fs/cgroup"
    (tmp_path / "proc").mkdir()
    group.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:   2000 kB\nMemAvailable:   1000 kB\nHugePages_Free:   0\n")
    assert available_bytes(tmp_path) == 1000 << 10
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("9000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 2000\n")
    assert available_bytes(tmp_path) == 1000 << 10
    (group / "memory.max").write_text("10000\n")
    assert available_bytes(tmp_path) == 3000
    assert available_bytes() > 0


def test_difference_only_in_cached_generation_is_found() -> None:
    import torch

    from mansard.models.probe import Answers
    from mansard.models.prove_stage import compare_answers

    logits_BTV, chosen_BG, steps_BGV = torch.rand(1, 3, 5), torch.tensor([[1, 2]]), torch.rand(1, 2, 5)
    base = Answers(logits_BTV, chosen_BG, steps_BGV)
    compare_answers(base, Answers(logits_BTV.clone(), chosen_BG.clone(), steps_BGV.clone()))
    other_BGV = steps_BGV.clone()
    other_BGV[0, 1, 4] += 0.25
    with pytest.raises(StageFailed, match=r"logits of cached generation in float32 differ by up to 0\.25"):
        compare_answers(base, Answers(logits_BTV, chosen_BG, other_BGV))
    with pytest.raises(StageFailed, match="tokens of cached generation in float32 differ by up to 1;"):
        compare_answers(base, Answers(logits_BTV, chosen_BG + 1, steps_BGV))


def test_checkpoint_with_a_missing_or_left_over_tensor_is_not_loaded(make_llama: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from mansard.models.loading import load_model

    source = make_llama()
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    for change, message in (("less", "1 missing tensors"), ("more", "1 unexpected tensors")):
        changed = {**tensors, "model.layers.0.extra.weight": tensors["model.norm.weight"].clone()}
        if change == "less":
            changed = {n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"}
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BadInput, match=message):
            load_model(tmp_path, None)
