"""Carry-ons on the CPU, on real vLLM engines: served answers against the Hugging Face class, many branches at once, the
cache's schemes, later epochs.

`greedy_equal_fraction`: tokens of a float32 engine with the plugin (continuous batching, chunked prefill, prefix
caching) that equal the Hugging Face class's; `tapped_...`: of a branch that reads every layer, and the largest relative
distance of the states that an engine gives for it (bf16 rounds by 0.002). `branches_served_at_once`: branches of which
requests in one batch on one running base all got their own branch's answer. `fp8_loss_ratio`, `int8_loss_ratio`:
held-out loss after the same training on states kept in 8 bits, against bf16. `later_epoch_ratio`: the first epoch
(states from the engine, then training) against a later one. Prints one JSON line last.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import torch

from mansard.canonical import canonical_json
from mansard.carry_on import capture_stage, train_stage
from mansard.carry_on.branch import Branch
from mansard.carry_on.branch_file import branch_bytes
from mansard.carry_on.model import CarryOnForCausalLM, load_carry_on, tapped_states
from mansard.carry_on.nodes import Node
from mansard.carry_on.sequences import TokenSequence
from mansard.composition.compose import compose, compose_slots
from mansard.composition.description import FILE, BranchDescription
from mansard.composition.shape import BranchShape, shape_of
from mansard.composition.tapping import tapped_config
from mansard.demo.base import save_base, train_tokenizer, untrained_model
from mansard.errors import MansardError
from mansard.evaluation.engine_api import get_json, post_json
from mansard.serving.engine.command import free_port, variables
from mansard.serving.engine.log import last_words
from mansard.site import load_site
from mansard.store.store import Store
from mansard.worker import Channel, StageContext

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"vocabulary": 512, "hidden": 128, "intermediate": 256, "blocks": 3, "heads": 2, "max_tokens": 512}
BRANCHES = 16
PROMPTS, TOKENS = 14, 24
START_SECONDS = 900.0
EPOCH_ROWS = 320
POOLING = [
    "--runner=pooling",
    '--pooler-config={"task": "token_embed", "use_activation": false}',
    "--no-enable-prefix-caching",
]
CHUNKED = ["--max-num-batched-tokens=96", "--enable-chunked-prefill", "--max-num-seqs=96"]


def main() -> int:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        store, base, tree = make_base(work)
        report = {
            **served_equally(work, store, base, tree),
            **tapped(work, store, base, tree),
            **many_branches(work, store, base, tree),
            **cache_schemes(work, store, base, tree),
        }
    print(json.dumps(report))
    is_equal = report["greedy_equal_fraction"] == report["tapped_greedy_equal_fraction"] == 1.0
    is_served = is_equal and report["branches_served_at_once"] == BRANCHES
    return 0 if is_served and report["fp8_loss_ratio"] <= 1.01 else 1


def make_base(work: Path) -> tuple[Store, str, Path]:
    """A small Llama with random weights, in a store."""
    texts = [f"word{i} " * 30 for i in range(50)]
    tree = work / "base"
    model = untrained_model(SHAPE, 0)
    with torch.no_grad():
        for parameter in model.parameters():  # far enough from zero that greedy answers are no ties
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    save_base(model, train_tokenizer(texts, SHAPE["vocabulary"], SHAPE["max_tokens"]), tree)
    store = Store(work / "store")
    return store, store.snapshot(tree), tree


def make_branch(folder: Path, base: str, seed: int, shape: BranchShape) -> Path:
    """A branch that says something, as a folder that both ways of serving take."""
    branch = Branch(shape)
    branch.start(seed)
    with torch.no_grad():
        branch.output.copy_(torch.randn(branch.output.shape, generator=torch.Generator().manual_seed(seed)))
    folder.mkdir(parents=True)
    tensors = dict(branch.named_parameters())
    (folder / FILE).write_bytes(branch_bytes(BranchDescription(base, shape, 1.0), tensors, torch.float32))
    (folder / "alpha.json").write_bytes(canonical_json({"alpha": 1.0}))
    return folder


def prompts() -> list[list[int]]:
    """Some share their beginning (prefix caching), some are longer than a step's budget (chunked prefill)."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(3, SHAPE["vocabulary"], (48,), generator=generator).tolist()
    made = []
    for number in range(PROMPTS):
        own = torch.randint(3, SHAPE["vocabulary"], (5 + 17 * number,), generator=generator).tolist()
        made.append((shared + own if number % 2 else own)[: SHAPE["max_tokens"] - TOKENS - 1])
    return made


def reference(model: CarryOnForCausalLM, prompt: list[int]) -> list[int]:
    """Greedy tokens of the Hugging Face class."""
    asked = torch.tensor([prompt])
    found = model.generate(asked, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    answer: list[int] = found[0, len(prompt) :].tolist()
    return answer


def served_equally(work: Path, store: Store, base: str, tree: Path) -> dict[str, Any]:
    """One branch composed into the artifact."""
    folder = make_branch(work / "one", base, 1, shape_of(128, 64, 2))
    artifact = compose(store, base, store.snapshot(folder), 0.75)
    served = work / "served"
    store.restore(artifact, served)
    model = load_carry_on(tree, base, folder / FILE, 0.75, torch.float32)
    expected = [reference(model, p) for p in prompts()]
    plain = load_carry_on(tree, base, folder / FILE, 0.0, torch.float32)
    changed = sum(reference(plain, p) != e for p, e in zip(prompts(), expected, strict=True))
    with engine(work, served, []) as endpoint:
        found = ask_all(endpoint, [("base", p) for p in prompts()])
        again = ask_all(endpoint, [("base", p) for p in prompts()])
    return {
        "greedy_equal_fraction": equal_fraction(expected, found),
        "greedy_equal_again": equal_fraction(expected, again),
        "answers_that_the_branch_changes": changed,
        "tokens_compared": PROMPTS * TOKENS,
    }


def tapped(work: Path, store: Store, base: str, tree: Path) -> dict[str, Any]:
    """A branch that reads every layer: the states that an engine in pooling mode gives for it, and the answers of one
    that serves it, beside the Hugging Face class."""
    taps = list(range(1, SHAPE["blocks"]))
    overrides = f"--hf-overrides={json.dumps(tapped_config(store, base, taps))}"
    asked = [TokenSequence(b"", numpy.array(p, dtype=numpy.int32)) for p in prompts()]
    with engine(work, tree, [*POOLING, overrides]) as endpoint:
        node = Node(endpoint, "base")
        assert node.taps() == taps, "the node says which layers it gives"
        given = node.states(asked)
    shape = shape_of(SHAPE["hidden"], 64, 2, taps)
    folder = make_branch(work / "tapped", base, 2, shape)
    model = load_carry_on(tree, base, folder / FILE, 0.75, torch.float32)
    distances = []
    for sequence, states in zip(asked, given, strict=True):
        with torch.no_grad():
            wanted = tapped_states(model.base.get_decoder(), taps, input_ids=torch.tensor(sequence.tokens)[None])[0]
        parts = zip(states.float().chunk(len(shape.widths), -1), wanted.chunk(len(shape.widths), -1), strict=True)
        distances += [float((part - right).norm() / right.norm()) for part, right in parts]
    served = work / "served-tapped"
    store.restore(compose(store, base, store.snapshot(folder), 0.75), served)
    expected = [reference(model, p) for p in prompts()]
    with engine(work, served, []) as endpoint:
        found = ask_all(endpoint, [("base", p) for p in prompts()])
    return {
        "tapped_greedy_equal_fraction": equal_fraction(expected, found),
        "tapped_states_distance": round(max(distances), 5),
    }


def many_branches(work: Path, store: Store, base: str, tree: Path) -> dict[str, Any]:
    """Sixteen branches on one running base, loaded while it runs, all asked at once, with the base beside them."""
    shape = shape_of(128, 64, 2)
    served = work / "slots"
    store.restore(compose_slots(store, base, shape, BRANCHES), served)
    folders = {f"customer-{n}": make_branch(work / f"b{n}", base, 100 + n, shape) for n in range(BRANCHES)}
    arguments = ["--enable-lora", f"--max-loras={BRANCHES}", f"--max-cpu-loras={2 * BRANCHES}", "--max-lora-rank=8"]
    some = prompts()[2:6]
    expected = {}
    for name, folder in folders.items():
        model = load_carry_on(tree, base, folder / FILE, 1.0, torch.float32)
        expected[name] = [reference(model, p) for p in some]
    model = load_carry_on(tree, base, folder / FILE, 0.0, torch.float32)
    expected["base"] = [reference(model, p) for p in some]
    with engine(work, served, arguments) as endpoint:
        for name, folder in folders.items():
            load_adapter(endpoint, name, folder)
        names = [name for name in expected for _ in some]
        begun = time.perf_counter()
        found = ask_all(endpoint, [(name, p) for name in expected for p in some])
        seconds = time.perf_counter() - begun
        alone = time.perf_counter()
        ask_all(endpoint, [("base", p) for _ in expected for p in some])
        base_seconds = time.perf_counter() - alone
        listed = {card["id"] for card in get_json(endpoint, "/v1/models")["data"]}
    right = dict.fromkeys(expected, True)
    for name, answer, wanted in zip(names, found, [a for e in expected.values() for a in e], strict=True):
        right[name] &= answer == wanted
    assert listed == set(expected), listed
    return {
        "branches_served_at_once": sum(right[name] for name in folders),
        "base_beside_them_is_right": right["base"],
        "many_branches_slowdown": round(seconds / base_seconds, 2),
    }


def cache_schemes(work: Path, store: Store, base: str, tree: Path) -> dict[str, Any]:
    """The same training on states kept in each way, captured from a vLLM engine in pooling mode: the standard library's
    text, one epoch captured, three trained."""
    inputs = {"artifact": base}
    for part, names in (("train", "abcdefghijklmnop"), ("held_out", "qrstuvwxyz")):
        files = [p for p in sorted(Path(os.__file__).parent.glob("*.py")) if p.name[0] in names]
        lines = [json.dumps({"text": p.read_text(errors="replace"), "file": p.name}) for p in files]
        inputs[f"data.code.{part}"] = store.put_files({"data.jsonl": "\n".join(lines).encode()})
    data = {
        "sequence_tokens": 128,
        "sources": [{"name": "code", "train": "-", "held_out": "-", "weight": 1.0, "is_domain": True}],
    }
    rows = {"code": {"train": EPOCH_ROWS, "held_out": 32}}
    train = {
        "batch_sequences": 4, "learning_rate": 2e-3, "precision": "fp32", "tokens": 3 * 128 * EPOCH_ROWS,
        "evaluate_every_steps": 10_000, "checkpoint_every_steps": 10_000,
    }  # fmt: skip
    losses, told = {}, {}
    with engine(work, tree, POOLING, dtype="bfloat16") as endpoint:
        for scheme in ("bf16", "fp8", "int8"):
            spec = {"data": data, "scheme": scheme, "rows": rows, "serve": {}, "engine": {}}
            where = {"nodes": [{"endpoint": endpoint, "served_name": "base"}]}
            begun = time.perf_counter()
            capture = capture_stage.run(stage_context(store, inputs, spec, where, work / f"c-{scheme}"))
            capture_seconds = time.perf_counter() - begun
            facts = json.loads(store.read_file(capture, "capture.json"))
            wish = {"data": data, "branch": {"width": 64}, "train": train, "alphas": [1.0]}
            asked = {"artifact": base, "capture": capture}
            begun = time.perf_counter()
            branch = train_stage.run(stage_context(store, asked, wish, {}, work / f"t-{scheme}"))
            epoch_seconds = (time.perf_counter() - begun) / 3
            curves = json.loads(store.read_file(branch, "branch.json"))["alphas"]
            losses[scheme] = curves[-1]["bits_per_byte"]["code"]
            told[scheme] = {
                "bytes_per_token": round(facts["bytes"] / facts["tokens"], 1),
                "capture_tokens_per_second": round(facts["tokens"] / capture_seconds),
                "bits_per_byte": [round(p["bits_per_byte"]["code"], 4) for p in curves],
                "later_epoch_ratio": round((capture_seconds + epoch_seconds) / epoch_seconds, 2),
            }
    return {
        "fp8_loss_ratio": round(losses["fp8"] / losses["bf16"], 5),
        "int8_loss_ratio": round(losses["int8"] / losses["bf16"], 5),
        "later_epoch_ratio": told["fp8"]["later_epoch_ratio"],
        "schemes": told,
    }


def stage_context(
    store: Store, inputs: dict[str, str], spec: dict[str, Any], where: dict[str, Any], work: Path
) -> StageContext:
    work.mkdir()
    return StageContext(store, "0" * 64, inputs, spec, where, work, Channel(io.StringIO()))


def equal_fraction(expected: list[list[int]], found: list[list[int]]) -> float:
    pairs = [(a, b) for e, f in zip(expected, found, strict=True) for a, b in zip(e, f, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def ask_all(endpoint: str, asked: list[tuple[str, list[int]]]) -> list[list[int]]:
    """Greedy token ids, all requests at once."""

    def ask(one: tuple[str, list[int]]) -> list[int]:
        name, prompt = one
        body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
        choice = post_json(endpoint, "/v1/completions", {**body, "return_token_ids": True})["choices"][0]
        tokens: list[int] = choice["token_ids"]
        return tokens

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(ask, asked))


def load_adapter(endpoint: str, name: str, folder: Path) -> None:
    """POST /v1/load_lora_adapter answers with text."""
    import urllib.request

    body = json.dumps({"lora_name": name, "lora_path": str(folder)}).encode()
    request = urllib.request.Request(
        f"{endpoint}/v1/load_lora_adapter", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        answer.read()


@contextlib.contextmanager
def engine(work: Path, tree: Path, arguments: list[str], dtype: str = "float32", cores: str = "") -> Iterator[str]:
    """A vLLM engine; a generating one has a small step's budget, so that long prompts come in chunks."""
    site = load_site(ROOT / "configs/site/local.yaml")
    port = free_port(8600, ())
    log = work / f"engine-{port}-{tree.name}.log"
    words = [
        str(site.environments["serve"].python), "-m", "vllm.entrypoints.openai.api_server", f"--model={tree}",
        "--served-model-name=base", "--host=127.0.0.1", f"--port={port}", f"--dtype={dtype}", "--enforce-eager",
        f"--max-model-len={SHAPE['max_tokens']}", *([] if "--runner=pooling" in arguments else CHUNKED),
        "--seed=0", "--no-enable-log-requests", "--disable-uvicorn-access-log", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, **variables(site, cores), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    environment["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'infra/vllm-plugin'}"  # the plugin beside this file
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=work)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                get_json(f"http://127.0.0.1:{port}", "/v1/models")
                break
            except MansardError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise MansardError(f"the engine did not come up: {last_words(log)}") from None
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    except BaseException:
        print(log.read_text(errors="replace")[-6000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    sys.exit(main())
