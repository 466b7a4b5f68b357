"""lm-evaluation-harness 0.4.13 through an engine's API; the only file that knows it.

Prompts go out as token ids, many in one request; prompt_logprobs.py says what comes back. Texts
(`loglikelihood_rolling`) are scored whole: the first token is conditioned on the tokenizer's opening token (BOS, else
EOS), a text longer than the window is cut into windows whose tokens are each counted once. Contexts of questions begin
with BOS exactly where the tokenizer itself begins a prompt with it, as it would for a user. Nothing is downloaded for
suites of our own: the tokenizer is the artifact's, the items are handed over in memory. Errors of the harness and of
its HTTP client become StageFailed.

Importing this file loads the harness (4 s): a stage imports it when it runs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import aiohttp
import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mansard.errors import BadInput, StageFailed
from mansard.evaluation.item_records import Record, bits_record, choice_record, right_or_wrong_record
from mansard.evaluation.prompt_logprobs import continuation_scores, question
from mansard.evaluation.suites import Item

PROMPTS_PER_REQUEST = 32
REQUESTS_AT_ONCE = 8
"""256 prompts are in flight, on every device and for every artifact: both sides of a comparison are asked alike."""

TIMEOUT_SECONDS = 3600
HARNESS_SEED = 1234
"""The harness's own default for drawing examples."""

Report = Callable[[int, int], None]
"""Called with prompts answered and prompts in all."""


@dataclass(frozen=True, slots=True)
class Engine:
    """Where an artifact answers, and the folder of its tokenizer."""

    endpoint: str
    served_name: str
    tokenizer: Path
    max_model_len: int


class EngineModel(LocalCompletionsAPI):  # type: ignore[misc]  # the harness is untyped; subclassing is its interface
    """The harness's API model, with texts tokenized in one go, whole texts batched and progress reported.

    `alternatives` is how many of the likeliest tokens are asked for beside each token of a prompt. With 0, `is_greedy`
    of an answer says nothing: our own suites do not use it, and the engine need not look for the likeliest token.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(
            model=engine.served_name,
            base_url=f"{engine.endpoint}/v1/completions",
            tokenizer=str(engine.tokenizer),
            tokenizer_backend="huggingface",
            tokenized_requests=True,
            batch_size=PROMPTS_PER_REQUEST,
            num_concurrent=REQUESTS_AT_ONCE,
            max_retries=5,
            max_length=engine.max_model_len,
            timeout=TIMEOUT_SECONDS,
            seed=0,
            header={"X-Mansard": "evaluate"},  # else OPENAI_API_KEY would be sent
        )
        opening = self.tokenizer("").input_ids[:1]
        self.opening = opening if opening == [self.tokenizer.bos_token_id] else []
        self.report: Report = lambda done, total: None
        self.done = self.total = 0
        self.alternatives = 0
        self._tokens: dict[str, list[int]] = {}
        if self.prefix_token_id is None:
            raise StageFailed(f"{engine.tokenizer}: the tokenizer has neither BOS nor EOS to open a text with")

    async def amodel_call(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - the harness's signature
        answers = await super().amodel_call(*arguments, **options)
        self.done += len(answers)
        self.report(self.done, self.total)
        return answers

    def _create_payload(
        self, messages: Any, generate: bool = False, seed: int = 0, **options: Any  # noqa: ANN401 - as above
    ) -> dict[str, Any]:
        if generate:
            return dict(super()._create_payload(messages, generate=True, seed=seed, **options))
        return question(self.model, messages, self.alternatives, seed)

    def parse_logprobs(
        self, outputs: Any, tokens: Any, ctxlens: Any, **_: Any  # noqa: ANN401 - as above
    ) -> list[tuple[float, bool]]:
        return continuation_scores(outputs, tokens, ctxlens)

    def tok_encode(self, string: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - as above
        if isinstance(string, str) and string in self._tokens:
            return self._tokens[string]
        return super().tok_encode(string, *arguments, **options)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The harness tokenizes a context as often as it has choices; here each text once, all in one batch."""
        pairs = [request.args for request in requests]
        texts = {text for context, choice in pairs for text in (context.rstrip(), context + choice)}
        self._tokens = dict(zip(texts, self._encode(texts), strict=True))
        try:
            return list(super().loglikelihood(requests, disable_tqdm))
        finally:
            self._tokens = {}

    def _encode(self, texts: Iterable[str]) -> list[list[int]]:
        listed = list(texts)
        return list(super().tok_encode(listed)) if listed else []

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The harness sends one text a request; here all windows of all texts share requests."""
        owners, windows = [], []
        for owner, tokens in enumerate(self._encode(request.args[0] for request in requests)):
            pairs = get_rolling_token_windows(
                tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
            )
            for pair in pairs:
                owners.append(owner)
                windows.append((None, *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for owner, (loglikelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += loglikelihood
        return totals

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_tokens, tokens = super()._encode_pair(context, continuation)
        if not tokens:
            raise StageFailed(
                f"choice {continuation!r:.60} adds no token after {context[-30:]!r}: the tokenizer merges the two; "
                "end the item's context with white space"
            )
        if len(tokens) >= self.max_length:
            raise StageFailed(f"choice {continuation!r:.60}: {len(tokens)} tokens, the engine takes {self.max_length}")
        return self.opening + context_tokens, tokens

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> Any:  # noqa: ANN401 - as above
        self.done, self.total = 0, len(requests)
        return super()._loglikelihood_tokens(requests, **options)


@lru_cache(maxsize=1)
def open_model(engine: Engine) -> EngineModel:
    """The model of `engine`; kept, so that several suites of one artifact load its tokenizer once."""
    return EngineModel(engine)


def answer_texts(model: EngineModel, name: str, items: Sequence[Item]) -> list[Record]:
    """Bits of each item's text."""
    config = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    samples = _samples(model, name, _local_task(name, config, items), limit=None)
    return [
        bits_record(item["id"], item["file"], float(sample["filtered_resps"][0]), len(item["text"].encode()))
        for item, sample in zip(items, samples, strict=True)
    ]


def answer_choices(model: EngineModel, name: str, items: Sequence[Item]) -> list[Record]:
    """Which choice each item's context is followed by."""
    config = {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
    }
    samples = _samples(model, name, _local_task(name, config, items), limit=None)
    records = []
    for item, sample in zip(items, samples, strict=True):
        asked = [tuple(a) for a in sample["arguments"]]
        assert asked == [(item["context"], c) for c in item["choices"]], f"{name}: the harness changed {item['id']}"
        loglikelihoods = [float(ll) for ll, _ in sample["filtered_resps"]]
        records.append(choice_record(item["id"], item["file"], loglikelihoods, item["choices"], item["answer"]))
    return records


@lru_cache(maxsize=1)
def _task_manager() -> TaskManager:
    """Its index of the harness's tasks takes seconds to build: once for all suites of a process."""
    return TaskManager()


def answer_task(model: EngineModel, name: str, limit: int | None) -> list[Record]:
    """A built-in task (or group of tasks) by name; each of its documents is a cluster of its own."""
    try:
        tasks = _task_manager().load([name])["tasks"]
    except KeyError as error:
        raise BadInput(f"task {name!r}: lm-evaluation-harness knows no such task") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise StageFailed(f"task {name!r}: its data cannot be had: {_words(error)}") from error
    records = []
    for task_name, task in tasks.items():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        for sample in _samples(model, task_name, task, limit, alternatives=1):
            records.append(_task_record(task_name, sample, len(task.get_config("target_delimiter") or "")))
    return records


def _local_task(name: str, config: dict[str, Any], items: Sequence[Item]) -> ConfigurableTask:
    """A task over items in memory: no file and no cache of the datasets library is written."""
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: datasets.DatasetDict({"test": datasets.Dataset.from_list(list(items))}),
            "test_split": "test",
            "num_fewshot": 0,
            **config,
        }
    )


def _samples(
    model: EngineModel, name: str, task: ConfigurableTask, limit: int | None, alternatives: int = 0
) -> list[dict[str, Any]]:
    """What the harness kept of each document, in the task's order; the first filter where there are several. Some of
    its tasks ask whether an answer is the greedy one: they need `alternatives`."""
    model.alternatives = alternatives
    task.set_fewshot_seed(seed=HARNESS_SEED)
    try:
        wanted = {"tasks": {name: task}, "groups": {}}
        result = evaluate(model, wanted, limit=limit, bootstrap_iters=0, log_samples=True)
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise StageFailed(f"suite {name}: {model.base_url}: {_words(error)}; see the engine's log") from error
    samples: list[dict[str, Any]] = result["samples"][name]
    first = [s for s in samples if s["filter"] == samples[0]["filter"]]
    return sorted(first, key=lambda s: int(s["doc_id"]))


def _task_record(task: str, sample: dict[str, Any], delimiter_length: int) -> Record:
    item_id = f"{task}/{sample['doc_id']}"
    if "bits_per_byte" in sample:
        loglikelihood, num_bytes = sample["bits_per_byte"]
        return bits_record(item_id, item_id, float(loglikelihood), int(num_bytes))
    options = len(sample["arguments"]) if "acc" in sample or "acc_norm" in sample else 0
    for metric in ("acc_norm", "acc", "exact_match"):
        if metric in sample:
            said = str(sample["filtered_resps"][0])
            if options:
                said = _said(sample, metric == "acc_norm", delimiter_length)
            asked = str(sample["arguments"][0][0])
            return right_or_wrong_record(item_id, item_id, float(sample[metric]), options, asked, said)
    known = ", ".join(sample["metrics"])
    raise BadInput(f"task {task!r} measures {known}; bits_per_byte, acc_norm, acc or exact_match is needed")


def _said(sample: dict[str, Any], is_by_length: bool, delimiter_length: int) -> str:
    """The option that the harness takes for the answer: the likeliest, for acc_norm by its characters."""
    options = [str(argument[1])[delimiter_length:] for argument in sample["arguments"]]
    scores = [
        float(response[0]) / (max(len(option), 1) if is_by_length else 1)
        for response, option in zip(sample["filtered_resps"], options, strict=True)
    ]
    return options[scores.index(max(scores))]


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
