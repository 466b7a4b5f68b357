"""Prompt log-probabilities of `/v1/completions` as bytes, for requests that ask: evaluation reads one number a token.

Asked for by `"vllm_xargs": {"mansard_compact_logprobs": 1}` beside `prompt_logprobs`. The engine computes what it
computes for any such request; only the API server's part is shorter: no `Logprob` object and no decoded text a token,
no JSON of them. Each choice's `mansard_prompt_logprobs` is {"columns": C, "float32": base64}: little-endian, a row of C
numbers for every prompt token but the first, its own log-probability and then those of the C - 1 likeliest tokens;
`prompt_logprobs` is null. vLLM without this plugin ignores the key and answers with its own `prompt_logprobs`.

Does not cover: streams, `echo`, and `logprobs` of the answer; they are answered as vLLM does.
"""

import base64
import sys
from typing import Any

import numpy

ASKS = "mansard_compact_logprobs"
LEAST = -9999.0
"""vLLM's JSON says this for minus infinity."""


def answer_compactly() -> None:
    """In processes that answer over HTTP, once."""
    if "vllm.entrypoints.openai" not in sys.modules:
        return
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    plain_params = CompletionRequest.to_sampling_params
    plain_response = OpenAIServingCompletion.request_output_to_completion_response
    if getattr(plain_response, "answers_compactly", False):
        return

    def to_sampling_params(self: Any, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - vLLM's own types
        params = plain_params(self, *arguments, **named)
        if asks(self):
            params.detokenize, params.flat_logprobs = False, True
        return params

    def request_output_to_completion_response(
        self: Any, outputs: Any, request: Any, *arguments: Any, **named: Any  # noqa: ANN401 - as above
    ) -> Any:  # noqa: ANN401 - as above
        if not asks(request):
            return plain_response(self, outputs, request, *arguments, **named)
        columns = 1 + request.prompt_logprobs
        compact = [compacted(output.prompt_logprobs.logprobs, columns) for output in outputs]
        for output in outputs:
            output.prompt_logprobs = None  # vLLM would make an object a token of it
        response = plain_response(self, outputs, request, *arguments, **named)
        for choice, value in zip(response.choices, compact, strict=True):
            choice.mansard_prompt_logprobs = value
        return response

    request_output_to_completion_response.answers_compactly = True  # type: ignore[attr-defined]
    CompletionRequest.to_sampling_params = to_sampling_params
    OpenAIServingCompletion.request_output_to_completion_response = request_output_to_completion_response


def asks(request: Any) -> bool:  # noqa: ANN401 - vLLM's CompletionRequest
    """Whether a request is for the compact form, and is one that has it: a choice a prompt, no text needed."""
    is_plain = not (request.stream or request.echo or request.stop or request.logprobs is not None)
    is_single = request.n == 1 and not request.use_beam_search
    has_logprobs = request.prompt_logprobs is not None and request.prompt_logprobs >= 0
    return bool((request.vllm_xargs or {}).get(ASKS)) and is_plain and is_single and has_logprobs


def compacted(logprobs: list[float], columns: int) -> dict[str, Any]:
    """`logprobs` of all tokens and columns in one list, as vLLM's FlatLogprobs has them."""
    numbers = numpy.maximum(numpy.asarray(logprobs, dtype="<f4"), numpy.float32(LEAST))
    return {"columns": columns, "float32": base64.b64encode(numbers.tobytes()).decode("ascii")}
