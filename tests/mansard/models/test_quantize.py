"""Quantization gives the same files every time, says how far they are from the input, refuses what it cannot take."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import BadInput
from mansard.launch import Request, derive, this_interpreter
from mansard.models.model_files import weight_files
from mansard.models.quantizable import check_quantizable, check_widths
from mansard.site import Site
from mansard.specs.surgery import Quantize
from mansard.store.safetensors_header import TensorEntry
from mansard.store.store import Store

pytestmark = [
    pytest.mark.slow,
    # transformers says so whenever llm-compressor hands it modules with hooks; the tiny model fits
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning"),
]

ROOT = Path(__file__).resolve().parents[3]
SPEC = {
    "scheme": "awq", "group_size": 128, "symmetric": False, "source": "words", "samples": 8, "sample_tokens": 32,
    "seed": 0,
}  # fmt: skip


def words(lines: int = 80) -> bytes:
    """JSONL text, the same each time."""
    pick = random.Random(0)
    text = [" ".join(pick.choices(["storey", "house", "roof", "slate", "beam", "attic"], k=6)) for _ in range(lines)]
    return b"".join(json.dumps({"text": t, "file": f"{i % 7}.txt"}).encode() + b"\n" for i, t in enumerate(text))


def run(context: Any) -> str:
    from mansard.models import quantize_stage

    return quantize_stage.run(context)


def test_two_runs_give_one_snapshot(make_llama: Any, make_context: Any, store: Store, tmp_path: Path) -> None:
    """One run in a worker process with two threads, one here with one thread."""
    import torch

    source = tmp_path / "model"
    source.mkdir()
    for file in make_llama().iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "mansard_expansion.json").write_text('{"format":1}')
    inputs = {"model": store.snapshot(source), "data": store.put_files({"data.jsonl": words()})}
    environment = this_interpreter(ROOT)
    environment.variables["OMP_NUM_THREADS"] = "2"
    site = Site(
        path=tmp_path / "site.yaml", home=tmp_path, data=tmp_path, models=("tiny",),
        environments={"main": environment}, stages={"default": "main"},
    )  # fmt: skip
    heard: list[dict[str, Any]] = []
    made = derive(store, site, Request("quantize", inputs, SPEC), lambda stage, message: heard.append(message))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = run(make_context(inputs, SPEC))
    finally:
        torch.set_num_threads(threads)
    assert again == made.snapshot

    assert [m["done"] for m in heard if m["total"] is not None] == [0, 1, 2, 3, 4]
    assert heard[-1]["metrics"]["kl_nats_per_token"] > 0
    check_artifact(store, made.snapshot, source)


def check_artifact(store: Store, snapshot: str, source: Path) -> None:
    files = store.manifest(snapshot).files
    assert set(files) == {f.name for f in source.iterdir()} | {"quantization.json"}
    for name in ("tokenizer.json", "tokenizer_config.json", "mansard_expansion.json"):
        assert store.read_file(snapshot, name) == (source / name).read_bytes()
    record = json.loads(store.read_file(snapshot, "quantization.json"))
    assert record["matrices"] == 2 * 7
    assert 0 < record["kl_nats_per_token"] < 0.05
    assert record["perplexity_quantized"] == pytest.approx(record["perplexity_input"], rel=0.05)
    config = json.loads(store.read_file(snapshot, "config.json"))
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 128
    for name in files:
        content = store.read_file(snapshot, name)
        assert str(source).encode() not in content and str(store.root).encode() not in content


def test_width_that_the_group_does_not_divide_is_refused_before_any_work(
    make_llama: Any, make_context: Any, store: Store
) -> None:
    inputs = {"model": store.snapshot(make_llama(intermediate_size=192)), "data": store.put_files({"data.jsonl": b""})}
    context = make_context(inputs, SPEC)
    with pytest.raises(BadInput, match=r"128 does not divide the input width 192 of .*down_proj.weight; take") as no:
        run(context)
    assert "\n" not in str(no.value)
    assert not any(context.work.iterdir())
    check_quantizable(store.manifest(inputs["model"]), Quantize(group_size=64, source="words"))


@pytest.mark.parametrize(
    ("widths", "group_size", "remedy"),
    [
        ((576, 1536), 128, "width 576 of .*; take group_size: 32 or 64, or scheme: none"),
        ((128, 96), 64, "width 96 of .*; take group_size: 32, or scheme: none"),
        ((128, 48), 32, "width 48 of .*; no group size divides all; scheme: none"),
    ],
)
def test_a_refusal_names_the_groups_that_divide_every_width(
    widths: tuple[int, ...], group_size: int, remedy: str
) -> None:
    tensors = [TensorEntry(f"model.layers.{i}.o.weight", "BF16", (128, w), 0, 0) for i, w in enumerate(widths)]
    tensors.append(TensorEntry("model.embed_tokens.weight", "BF16", (100, 7), 0, 0))
    with pytest.raises(BadInput, match=remedy):
        check_widths(tensors, Quantize(group_size=group_size, source="words"))
    check_widths(tensors, Quantize(scheme="none"))


@pytest.mark.parametrize(("group_size", "is_symmetric"), [(64, False), (32, True)])
def test_groups_and_symmetry_are_what_the_spec_says(
    group_size: int, is_symmetric: bool, make_llama: Any, make_context: Any, store: Store
) -> None:
    model, data = store.snapshot(make_llama(intermediate_size=192)), store.put_files({"data.jsonl": words()})
    settings = {**SPEC, "group_size": group_size, "symmetric": is_symmetric}
    artifact = run(make_context({"model": model, "data": data}, settings))
    config = json.loads(store.read_file(artifact, "config.json"))
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["group_size"], weights["symmetric"], weights["num_bits"]) == (group_size, is_symmetric, 4)
    record = json.loads(store.read_file(artifact, "quantization.json"))
    assert (record["group_size"], record["symmetric"]) == (group_size, is_symmetric)
    names = {name for file in weight_files(store.manifest(artifact)).values() for name in file.tensors}
    assert any(name.endswith("weight_zero_point") for name in names) != is_symmetric
    assert 0 < record["kl_nats_per_token"] < 0.05


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_is_refused_before_any_work(family: str, make_family: Any, store: Store) -> None:
    manifest = store.manifest(store.snapshot(make_family(family)))
    with pytest.raises(BadInput, match=r"awq cannot quantize mixtures of experts .*; take scheme: none") as no:
        check_quantizable(manifest, Quantize(source="words"))
    assert "\n" not in str(no.value)
    check_quantizable(manifest, Quantize(scheme="none"))


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (words(3), {}, "tokens, but 24 windows of 32 tokens"),
        (b'{"text": "caf\xe9"}\n', {}, "line 1 is not UTF-8"),
        (b'{"file": "a"}\n', {}, 'line 1 is not a JSON object with "text"'),
        (b'{"text": 7}\n', {}, '"text" is int, a string is expected'),
        (words(), {"sample_tokens": 130, "samples": 1}, "the model takes at most 128 tokens"),
    ],
)
def test_bad_calibration_text_is_refused(
    text: bytes, change: dict[str, int], message: str, make_llama: Any, make_context: Any, store: Store
) -> None:
    inputs = {"model": store.snapshot(make_llama()), "data": store.put_files({"data.jsonl": text})}
    with pytest.raises(BadInput, match=message):
        run(make_context(inputs, {**SPEC, **change}))


def test_windows_are_the_text_in_file_order(make_llama: Any) -> None:
    from mansard.models.loading import load_tokenizer
    from mansard.models.windows import first_windows

    tokenizer = load_tokenizer(make_llama())
    lines = [b'{"text": "abcd"}', b"", b'{"text": "ef"}', b'{"text": "unread"}']
    windows_WT = first_windows(tokenizer, lines, 2, 4, "text")
    assert tokenizer.decode(windows_WT[0]) == "abcd"
    assert windows_WT[1, 0] == tokenizer.eos_token_id and tokenizer.decode(windows_WT[1, 1:3]) == "ef"


def test_distance_of_known_logits() -> None:
    import torch

    from mansard.models.distance import distance

    probe_WT = torch.tensor([[0, 1, 1]])
    uniform = [torch.zeros(3, 2)]
    skewed = [torch.tensor([[0.0, math.log(3.0)]] * 3)]
    same = distance(uniform, uniform, probe_WT)
    assert same.kl_nats_per_token == 0 and same.perplexity_reference == pytest.approx(2) == same.perplexity_other
    far = distance(uniform, skewed, probe_WT)
    assert far.kl_nats_per_token == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert far.perplexity_other == pytest.approx(4 / 3)


def test_distance_of_broken_logits_is_not_finite() -> None:
    import torch

    from mansard.models.distance import distance

    broken = [torch.tensor([[0.0, float("nan")]] * 3)]
    far = distance([torch.zeros(3, 2)], broken, torch.tensor([[0, 1, 1]]))
    assert not math.isfinite(far.kl_nats_per_token) and not math.isfinite(far.perplexity_other)
    certain_but_wrong = [torch.tensor([[0.0, 9e3]] * 3)]
    assert distance(certain_but_wrong, certain_but_wrong, torch.tensor([[1, 0, 0]])).perplexity_other == math.inf


def test_a_cpu_calibrates_in_batches_of_eight_and_float16_does_everywhere() -> None:
    """A large batch's squared error would overflow float16."""
    from types import SimpleNamespace

    import torch

    from mansard.models.quantize import calibration_place

    windows_WT = torch.zeros(64, 32, dtype=torch.int64)
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float16)):
        model: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
        assert calibration_place(model, windows_WT) == (8, "cpu")
