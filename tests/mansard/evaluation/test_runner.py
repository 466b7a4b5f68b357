"""The harness against a local HTTP server that scores token ids as an engine does: every token counts once."""

import base64
import json
import math
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mansard.errors import BadInput, StageFailed

pytestmark = pytest.mark.slow

WINDOW = 40
EOS, BOS = 0, 257


def logprob(token: int) -> float:
    """What the server believes of a token, whatever stands before it."""
    return -0.25 - (token % 13) / 8


def likeliest(token: int) -> float:
    """Above every third token stands a likelier one."""
    return logprob(token) + (0.125 if token % 3 == 0 else 0.0)


def as_json(prompt: list[int], alternatives: int) -> dict[str, object]:
    """vLLM's own answer; what the likeliest other token is does not matter."""
    entries: list[dict[str, dict[str, object]] | None] = [None]
    for token in prompt[1:]:
        entry = {str(token): {"logprob": logprob(token), "rank": 1, "decoded_token": "x"}}
        if alternatives and likeliest(token) != logprob(token):
            entry["-1"] = {"logprob": likeliest(token), "rank": 1, "decoded_token": "y"}
        entries.append(entry)
    return {"prompt_logprobs": entries}


def as_bytes(prompt: list[int], alternatives: int) -> dict[str, object]:
    """The plugin's answer to the same."""
    numbers = [n for t in prompt[1:] for n in [logprob(t), *[likeliest(t)] * alternatives]]
    packed = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
    return {"prompt_logprobs": None, "mansard_prompt_logprobs": {"columns": 1 + alternatives, "float32": packed}}


@contextmanager
def scoring_engine(asked: list[list[int]], refuse: bool = False, has_plugin: bool = True) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompts: list[list[int]] = body["prompt"]
            asked.extend(prompts)
            answer = as_bytes if has_plugin and body["vllm_xargs"]["mansard_compact_logprobs"] else as_json
            choices = [{"index": i, **answer(p, body["prompt_logprobs"])} for i, p in enumerate(prompts)][::-1]
            assert body["max_tokens"] == 1 and max(map(len, prompts)) < WINDOW
            data = json.dumps({"choices": choices}).encode()
            self.send_response(500 if refuse else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a byte; token 0 ends a text, and there is no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": EOS, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opening_tokenizer_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer, which begins every prompt with a BOS (token 257)."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<bos>"])
    assert tokenizer.token_to_id("<bos>") == BOS
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    folder = tmp_path_factory.mktemp("opening-tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>").save_pretrained(folder)
    return folder


def tokens_of(text: str, folder: Path) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)


@pytest.mark.parametrize("has_plugin", [True, False])
def test_every_token_of_a_text_counts_once_also_over_windows(tokenizer_folder: Path, has_plugin: bool) -> None:
    from mansard.evaluation import runner

    texts = ["x", "def f():\n    return 'é'\n", "a long text " * 30]
    items = [{"id": f"i{n}", "file": "f", "text": t} for n, t in enumerate(texts)]
    asked: list[list[int]] = []
    told: list[tuple[int, int]] = []
    with scoring_engine(asked, has_plugin=has_plugin) as endpoint:
        model = runner.open_model(runner.Engine(endpoint, "demo", tokenizer_folder, WINDOW))
        model.report = lambda done, total: told.append((done, total))
        records = runner.answer_texts(model, "texts", items)
    for record, text in zip(records, texts, strict=True):
        wanted = -sum(logprob(t) for t in tokens_of(text, tokenizer_folder)) / math.log(2)
        assert record["bits"] == pytest.approx(wanted, abs=1e-3) and record["bytes"] == len(text.encode())
    assert [EOS, *tokens_of("x", tokenizer_folder)] in asked, "a text opens with EOS where BOS is absent"
    assert told[-1] == (len(asked), len(asked)) and len(asked) > 3


def test_prompts_open_with_one_bos_where_the_tokenizer_adds_it(
    tokenizer_folder: Path, opening_tokenizer_folder: Path
) -> None:
    from mansard.evaluation import runner

    asked: list[list[int]] = []
    with scoring_engine(asked) as endpoint:
        model = runner.open_model(runner.Engine(endpoint, "demo", opening_tokenizer_folder, WINDOW))
        runner.answer_texts(model, "texts", [{"id": "a", "file": "f", "text": "xyz"}])
        question = {"id": "a", "file": "f", "context": "q:", "choices": ["y", "n"], "answer": 0}
        runner.answer_choices(model, "choices", [question])
    wanted = [[BOS, *tokens_of(text, tokenizer_folder)] for text in ("xyz", "q:n", "q:y")]
    assert sorted(asked) == sorted(wanted)


def test_the_likeliest_choice_per_byte_is_chosen(tokenizer_folder: Path) -> None:
    from mansard.evaluation import runner

    items = [
        {"id": "a", "file": "f", "context": "one\n", "choices": ["two\n", "three and four\n", "5\n"], "answer": 1},
        {"id": "b", "file": "g", "context": "12", "choices": ["7", "é"], "answer": 0},
        {"id": "c", "file": "g", "context": "", "choices": ["no", "context"], "answer": 0},
    ]
    with scoring_engine([]) as endpoint:
        model = runner.open_model(runner.Engine(endpoint, "demo", tokenizer_folder, WINDOW))
        records = runner.answer_choices(model, "choices", items)
    assert [r["id"] for r in records] == ["a", "b", "c"]
    for record, item in zip(records, items, strict=True):
        moved = item["context"][len(item["context"].rstrip()) :]  # type: ignore[attr-defined, index, arg-type]
        wanted = [
            sum(logprob(t) for t in tokens_of(moved + c, tokenizer_folder)) / len(c.encode())
            for c in item["choices"]  # type: ignore[attr-defined]
        ]
        assert record["scores"] == pytest.approx(wanted, abs=1e-4)
        assert record["chosen"] == wanted.index(max(wanted))
        assert record["correct"] == (record["chosen"] == item["answer"])


def test_task_of_the_harness_gives_records(tokenizer_folder: Path, tmp_path: Path) -> None:
    from mansard.evaluation import runner

    lines = [{"q": f"question {n}:", "options": ["yes", "no", "maybe"], "right": n % 3} for n in range(6)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "quiz.yaml").write_text(
        "task: quiz\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/q.jsonl}}, cache_dir: {tmp_path}/cache}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: options\ndoc_to_target: right\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    with scoring_engine([]) as endpoint:
        model = runner.open_model(runner.Engine(endpoint, "demo", tokenizer_folder, WINDOW))
        records = runner.answer_task(model, str(tmp_path / "quiz.yaml"), limit=4)
    assert [r["id"] for r in records] == ["quiz/0", "quiz/1", "quiz/2", "quiz/3"]
    assert all(r["options"] == 3 and r["correct"] in (0.0, 1.0) for r in records)
    for number, record in enumerate(records):
        assert record["asked"] == f"question {number}:" and record["said"] in lines[0]["options"]
        assert (record["said"] == lines[number]["options"][number % 3]) == bool(record["correct"])


@pytest.mark.parametrize("has_plugin", [True, False])
def test_a_task_is_told_whether_an_answer_is_the_greedy_one(
    tokenizer_folder: Path, tmp_path: Path, has_plugin: bool
) -> None:
    from mansard.evaluation import runner

    ends = ["a", "b", "c", "d", "ab", "ad", "é"]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"q": "go on:", "end": end}) + "\n" for end in ends))
    (tmp_path / "greedy.yaml").write_text(
        "task: greedy\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/q.jsonl}}, cache_dir: {tmp_path}/cache}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: end\ntarget_delimiter: ''\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    with scoring_engine([], has_plugin=has_plugin) as endpoint:
        model = runner.open_model(runner.Engine(endpoint, "demo", tokenizer_folder, WINDOW))
        records = runner.answer_task(model, str(tmp_path / "greedy.yaml"), limit=None)
    expected = [all(likeliest(t) == logprob(t) for t in tokens_of(end, tokenizer_folder)) for end in ends]
    assert [bool(r["correct"]) for r in records] == expected and len(set(expected)) == 2


def test_texts_are_tokenized_in_one_batch_as_one_by_one(opening_tokenizer_folder: Path) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from mansard.evaluation import runner

    pairs = [("one two ", "three"), ("one two ", "four"), ("", "five"), ("  ", "six"), ("é\n", "7"), ("x", " y")]
    requests = [type("Request", (), {"args": pair})() for pair in pairs]
    encoded: list[list[object]] = []
    model = runner.EngineModel(runner.Engine("http://127.0.0.1:9", "demo", opening_tokenizer_folder, WINDOW))
    model._loglikelihood_tokens = lambda listed, **_: encoded.append(listed) or listed
    model.loglikelihood(requests)
    LocalCompletionsAPI.loglikelihood(model, requests)
    assert encoded[0] == encoded[1] and len(encoded[0]) == len(pairs)


def test_unknown_task_is_refused_by_name(tokenizer_folder: Path) -> None:
    from mansard.evaluation import runner

    with scoring_engine([]) as endpoint:
        model = runner.open_model(runner.Engine(endpoint, "demo", tokenizer_folder, WINDOW))
        with pytest.raises(BadInput, match="no_such_task"):
            runner.answer_task(model, "no_such_task", 1)


def test_engine_that_refuses_stops_the_stage_with_one_line(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mansard.evaluation import runner

    items = [{"id": "a", "file": "f", "text": "x"}]
    with scoring_engine([], refuse=True) as endpoint:
        model = runner.EngineModel(runner.Engine(endpoint, "demo", tokenizer_folder, WINDOW))
        model.max_retries = 1
        with pytest.raises(StageFailed, match=r"suite texts: .*500.*see the engine's log"):
            runner.answer_texts(model, "texts", items)


def test_choice_longer_than_the_window_is_refused(tokenizer_folder: Path) -> None:
    from mansard.evaluation import runner

    items = [{"id": "a", "file": "f", "context": "c", "choices": ["x" * WINDOW, "y"], "answer": 0}]
    with scoring_engine([]) as endpoint:
        model = runner.open_model(runner.Engine(endpoint, "demo", tokenizer_folder, WINDOW))
        with pytest.raises(StageFailed, match="40 tokens"):
            runner.answer_choices(model, "choices", items)
