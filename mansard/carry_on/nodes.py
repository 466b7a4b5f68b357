"""Inference nodes that give states away: vLLM engines in pooling mode, asked over HTTP. serving_node.py has the kind
that serves users.

A node is checked before it is used: model, artifact where its folder is named by one, length. Several nodes must agree
on a probe, so that one with another model, tokenizer or quantization is found. Standard library and numpy only.
"""

import http.client
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy
import torch

from mansard.carry_on.sequences import TokenSequence
from mansard.errors import BadInput, MansardError
from mansard.evaluation.engine_api import check_serves

TIMEOUT_SECONDS = 600.0
AGREEMENT = 0.02
"""The largest relative distance of two nodes' states on the probe: bf16 kernels differ by less than 0.01, 4-bit from
16-bit weights by more than 0.05."""


class NodeFailed(MansardError):
    """A node did not answer, or not with states; another may."""


@dataclass(frozen=True, slots=True)
class Node:
    """A pooling endpoint, http://HOST:PORT, the name under which it serves the base, and the quantization that the site
    says it has."""

    endpoint: str
    served_name: str
    quantization: str | None = None
    answered_tokens: ClassVar[int] = 0
    """So many tokens the node puts behind a sequence: they must fit, too."""

    def check(self, artifact: str, longest: int) -> None:
        """StageFailed where it serves something else; BadInput where the longest sequence does not fit."""
        check_serves(self.endpoint, self.served_name, artifact)
        for card in self._cards():
            room = card.get("max_model_len")
            if room is not None and room < longest + self.answered_tokens:
                raise BadInput(
                    f"{self.endpoint} takes {room} tokens, the longest sequence has {longest}"
                    + (f" and {self.answered_tokens} that the node answers" if self.answered_tokens else "")
                    + "; make data.sequence_tokens smaller or start the node with a longer --max-model-len"
                )

    def models(self) -> list[dict[str, Any]]:
        """What /v1/models lists; NodeFailed while the node does not answer."""
        listed: list[dict[str, Any]] = json.loads(ask(self.endpoint, "GET", "/v1/models", None)[0])["data"]
        return listed

    def taps(self) -> list[int]:
        """The layers whose states follow the final one's, as the plugin says them; none where it says nothing."""
        return [int(tap) for card in self._cards() for tap in card.get("carry_on_taps", [])]

    def told_quantization(self) -> str | None:
        """How its weights are kept, as the plugin says (`none`: as they were trained); None where it says nothing."""
        told = [card.get("carry_on_quantization") for card in self._cards()]
        return str(told[0]) if told and told[0] is not None else None

    def _cards(self) -> list[dict[str, Any]]:
        """Those of the base."""
        return [card for card in self.models() if card["id"] == self.served_name]

    def states(self, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
        """bf16 states after the last norm, [tokens, D] each; NodeFailed where any is missing. Coding them finds those
        that are not finite."""
        body = {
            "model": self.served_name,
            "task": "token_embed",
            "input": [s.tokens.tolist() for s in sequences],
            "encoding_format": "bytes",
            "embed_dtype": "bfloat16",
            "endianness": "little",
        }
        data, headers = ask(self.endpoint, "POST", "/pooling", body)
        try:
            items = sorted(json.loads(headers["metadata"])["data"], key=lambda item: item["index"])
        except (KeyError, ValueError) as error:
            raise NodeFailed(f"{self.endpoint}/pooling: no metadata of states in the answer: {error}") from error
        if [i["shape"][0] for i in items] != [len(s.tokens) for s in sequences]:
            raise NodeFailed(f"{self.endpoint}/pooling: states of {len(items)} sequences, not of every token")
        whole = memoryview(data)
        return [_tensor(whole[i["start"] : i["end"]], i["shape"]) for i in items]


def ask(endpoint: str, method: str, path: str, body: dict[str, Any] | None) -> tuple[bytes, http.client.HTTPMessage]:
    """The answer's body and headers; NodeFailed where there is none, or not 200."""
    parts = urlsplit(endpoint)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise BadInput(f"node {endpoint!r}: http://HOST:PORT is expected")
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_SECONDS)
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise NodeFailed(f"{endpoint}{path}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        words = " ".join(answer.decode(errors="replace").split())[:200]
        raise NodeFailed(f"{endpoint}{path} answered {response.status}: {words}")
    return answer, response.headers


def check_agreement(nodes: Sequence[Node], probe: TokenSequence) -> int:
    """The states' width; BadInput where a node's states of the probe are not the first one's."""
    reference = nodes[0].states([probe])[0].float()
    for node in nodes[1:]:
        found = node.states([probe])[0].float()
        if found.shape != reference.shape:
            raise BadInput(
                f"{node.endpoint} gives states of width {found.shape[-1]}, "
                f"{nodes[0].endpoint} of {reference.shape[-1]}; "
                "all nodes must serve the same base"
            )
        distance = float((found - reference).norm() / reference.norm())
        if not math.isfinite(distance) or distance > AGREEMENT:
            raise BadInput(
                f"{node.endpoint} and {nodes[0].endpoint} differ by {distance:.3f} on a probe (at most {AGREEMENT}); "
                "all nodes must serve the same base in the same quantization"
            )
    return int(reference.shape[-1])


def _tensor(data: memoryview, shape: Sequence[int]) -> torch.Tensor:
    if len(data) != 2 * math.prod(shape):
        raise NodeFailed(f"states of shape {list(shape)} have {len(data)} bytes: the answer was cut")
    return torch.from_numpy(numpy.frombuffer(data, dtype="<i2").copy()).view(torch.bfloat16).view(*shape)
