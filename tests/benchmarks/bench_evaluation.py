"""Evaluation through one engine, side by side: the harness's own way of asking, and ours.

`harness` asks as lm-evaluation-harness does (echo, one alternative a token, text by text tokenized, four requests at a
time); `json` asks for one number a token and gets vLLM's own JSON; `bytes_N` is what stage `evaluate` does, N requests
at a time. The same two suites (texts, and choices after a context) from the standard library's sources go to each, in
turns; the best of the rounds counts. The last line is JSON: prompt tokens/s of each, `ratio` (the stage's own over the
harness's), `differing` (records whose numbers are not those of `harness`) and `tokenize_seconds`.

    bench_evaluation.py                      # the demo's shape of random weights, on a CPU
    bench_evaluation.py --model FOLDER --site configs/site/gpu.yaml --items 2000      # a real model on a GPU
    bench_evaluation.py --model FOLDER --endpoint http://127.0.0.1:8100 --served-name demo    # an engine that runs
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from demo_shape import SHAPE
from lm_eval.models.openai_completions import LocalCompletionsAPI

from mansard.demo.base import save_base, train_tokenizer, untrained_model
from mansard.demo.corpus import listed_files, read_domains
from mansard.errors import MansardError
from mansard.evaluation import prompt_logprobs
from mansard.evaluation.engine_api import get_json, post_json
from mansard.evaluation.item_records import Record
from mansard.evaluation.runner import REQUESTS_AT_ONCE, Engine, EngineModel, answer_choices, answer_texts
from mansard.evaluation.suites import Item
from mansard.serving.engine.command import EngineIdentity, command, free_port, variables
from mansard.serving.engine.log import last_words
from mansard.site import load_site
from mansard.specs.whole import Serve

ROOT = Path(__file__).resolve().parents[2]
SERVED_NAME = "bench"
START_SECONDS = 900.0
ITEM_CHARACTERS = 1200
CHOICE_CHARACTERS = 60
CHOICES = 4


class HarnessModel(EngineModel):
    """Asks and reads as the harness itself does."""

    _create_payload = LocalCompletionsAPI._create_payload
    parse_logprobs = staticmethod(LocalCompletionsAPI.parse_logprobs)
    loglikelihood = LocalCompletionsAPI.loglikelihood

    def _encode(self, texts: Any) -> list[list[int]]:
        return [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]


class JsonModel(EngineModel):
    """Asks as the stage does of an engine without our plugin."""

    def _create_payload(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        body = dict(super()._create_payload(*arguments, **options))
        body.pop("vllm_xargs", None)
        return body


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (left out: random weights)")
    parser.add_argument("--endpoint", help="an engine that serves MODEL already")
    parser.add_argument("--served-name", default=SERVED_NAME)
    parser.add_argument("--site", type=Path, default=ROOT / "configs/site/local.yaml", help="how an engine is started")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--enforce-eager", action="store_true", help="no compilation in the engine that is started")
    parser.add_argument("--items", type=int, default=200, help="texts, and half as many questions")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--at-once", type=int, nargs="+", default=[4, REQUESTS_AT_ONCE, 16])
    arguments = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory(prefix="bench-evaluation-") as name:
        work = Path(name)
        tree = (arguments.model or small_model(work / "model")).resolve()
        with contextlib.ExitStack() as stack:
            endpoint = arguments.endpoint or stack.enter_context(started(work, tree, arguments))
            engine = Engine(endpoint, arguments.served_name, tree, arguments.max_model_len)
            print(json.dumps(measure(engine, *suites(arguments.items), arguments.at_once, arguments.rounds)))
    return 0


def small_model(folder: Path) -> Path:
    """The demo's shape of random weights, with a tokenizer of the text that is scored."""
    tokenizer = train_tokenizer([library_code(60)], SHAPE["vocabulary"], SHAPE["max_tokens"])
    save_base(untrained_model(SHAPE, 0), tokenizer, folder)
    return folder


def library_code(files: int | None = None) -> str:
    """The code of the standard library's first `files` files."""
    library = Path(sysconfig.get_path("stdlib"))
    return "".join(document.text for document in read_domains(library, listed_files(library)[:files])["code"])


def suites(count: int) -> tuple[list[Item], list[Item]]:
    """Texts, and questions half as many: which of four pieces follows a context."""
    code = library_code()
    pieces = [code[i : i + ITEM_CHARACTERS] for i in range(0, len(code), ITEM_CHARACTERS)][:count]
    texts = [{"id": f"t{n}", "file": f"f{n}", "text": text} for n, text in enumerate(pieces)]
    questions = []
    for n, text in enumerate(pieces[: count // 2]):
        context, rest = text[: -CHOICE_CHARACTERS * CHOICES] + "\n", text[-CHOICE_CHARACTERS * CHOICES :]
        choices = [f"{i}{rest[i * CHOICE_CHARACTERS :][:CHOICE_CHARACTERS]}" for i in range(CHOICES)]
        questions.append({"id": f"q{n}", "file": f"f{n}", "context": context, "choices": choices, "answer": 0})
    return texts, questions


def measure(
    engine: Engine, texts: list[Item], questions: list[Item], at_once: Sequence[int], rounds: int
) -> dict[str, Any]:
    models: dict[str, EngineModel] = {"harness": HarnessModel(engine), "json": JsonModel(engine)}
    models["harness"]._concurrent = 4
    for number in dict.fromkeys(at_once):
        models[f"bytes_{number}"] = EngineModel(engine)
        models[f"bytes_{number}"]._concurrent = number
    check_bytes(engine)
    answered(models["json"], texts[:64], questions[:16])  # the first answers pay for what the engine does once
    best: dict[str, float] = {}
    records: dict[str, list[Record]] = {}
    for turn in range(rounds):
        for name in list(models) if turn % 2 == 0 else reversed(models):
            start = time.perf_counter()
            records[name] = answered(models[name], texts, questions)
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
            print(f"{name}: {time.perf_counter() - start:.2f} s", file=sys.stderr)
    tokens, tokenize_seconds = count_tokens(models["harness"], texts, questions)
    rates = {name: round(tokens / seconds) for name, seconds in best.items()}
    own = f"bytes_{REQUESTS_AT_ONCE}" if REQUESTS_AT_ONCE in at_once else name
    return {
        "prompt_tokens": tokens,
        "prompt_tokens_per_second": rates,
        "ratio": round(rates[own] / rates["harness"], 2),
        "differing": {
            name: sum(a != b for a, b in zip(found, records["harness"], strict=True))
            for name, found in records.items()
        },
        "num_records": len(records["harness"]),
        "tokenize_seconds": tokenize_seconds,
        "vllm": get_json(engine.endpoint, "/version")["version"],
    }


def answered(model: EngineModel, texts: list[Item], questions: list[Item]) -> list[Record]:
    return answer_texts(model, "texts", texts) + answer_choices(model, "choices", questions)


def check_bytes(engine: Engine) -> None:
    """The engine must have the plugin, or `bytes` would be `json` by another name."""
    body = prompt_logprobs.question(engine.served_name, [[5, 6, 7]], 0, 0)
    if "mansard_prompt_logprobs" not in post_json(engine.endpoint, "/v1/completions", body)["choices"][0]:
        raise SystemExit(f"{engine.endpoint}: answers without infra/vllm-plugin; install it beside vLLM (make setup)")


def count_tokens(model: EngineModel, texts: list[Item], questions: list[Item]) -> tuple[int, dict[str, float]]:
    """Tokens of all prompts, near enough, and seconds to tokenize them one by one and in a batch."""
    prompts = [t["text"] for t in texts] + [q["context"] + c for q in questions for c in q["choices"]]
    start = time.perf_counter()
    tokens = sum(len(model.tokenizer(p, add_special_tokens=False).input_ids) for p in prompts)
    middle = time.perf_counter()
    model.tokenizer(prompts, add_special_tokens=False)
    return tokens, {
        "one_by_one": round(middle - start, 2), "batch": round(time.perf_counter() - middle, 2)
    }  # fmt: skip


@contextlib.contextmanager
def started(work: Path, tree: Path, arguments: argparse.Namespace) -> Iterator[str]:
    """An engine as the host starts it, with the plugin beside this file."""
    site = load_site(arguments.site)
    serve = Serve(max_model_len=arguments.max_model_len, enforce_eager=arguments.enforce_eager)
    port, log = free_port(8700, ()), work / "engine.log"
    words = command(EngineIdentity("bench", arguments.served_name, serve), tree, port, site)
    environment = {**os.environ, **variables(site, ""), "VLLM_CACHE_ROOT": str(work / "vllm")}
    paths = [environment.get("PYTHONPATH", ""), str(ROOT / "infra/vllm-plugin")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    endpoint, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    with log.open("wb") as output:
        child = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=work)
    try:
        while not answers(endpoint):
            if child.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the engine did not come up: {last_words(log)}")
            time.sleep(0.5)
        yield endpoint
    finally:
        child.terminate()
        child.wait(60)


def answers(endpoint: str) -> bool:
    try:
        get_json(endpoint, "/v1/models")
    except MansardError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
