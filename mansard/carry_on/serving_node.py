"""An inference node that serves users, and gives away the states of the prompts that ask for them.

Its engine runs the plugin's CarryOnStates... class and connector (infra/vllm-plugin): each sequence is a request for
one token, scheduled among users' requests, and its states wait at a port of their own.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

import torch

from mansard.carry_on.nodes import Node, NodeFailed, ask
from mansard.carry_on.sequences import TokenSequence

ASKS = "mansard_states"
"""The connector's word in `kv_transfer_params`."""
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class ServingNode(Node):
    """A generating endpoint, http://HOST:PORT, and the name under which it serves the base."""

    answered_tokens: ClassVar[int] = 1

    def states(self, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
        """bf16 states after the last norm, then the taps', [tokens, W] each; NodeFailed where any is missing."""
        with ThreadPoolExecutor(len(sequences)) as pool:  # vLLM puts them into its batches
            return [states.to(torch.bfloat16) for states in pool.map(self.states_as_served, sequences)]

    def states_as_served(self, sequence: TokenSequence) -> torch.Tensor:
        """In the engine's own data type."""
        where = f"{self.endpoint}/v1/completions"
        body = {
            "model": self.served_name,
            "prompt": sequence.tokens.tolist(),
            "max_tokens": 1,
            "temperature": 0.0,
            "kv_transfer_params": {ASKS: True},
        }
        answer, _ = ask(self.endpoint, "POST", "/v1/completions", body)
        try:
            waits = json.loads(answer)["kv_transfer_params"][ASKS]
            port, key = int(waits["port"]), str(waits["key"])
        except (KeyError, TypeError, ValueError) as error:
            raise NodeFailed(
                f"{where}: no states beside the answer; start the engine with architectures CarryOnStates... and "
                "--kv-transfer-config of mansard_vllm.connector, or list it as kind: pooling"
            ) from error
        states = self._fetched(port, key)
        if len(states) != len(sequence.tokens):
            raise NodeFailed(f"{where}: states of {len(states)} tokens, the sequence has {len(sequence.tokens)}")
        return states

    def _fetched(self, port: int, key: str) -> torch.Tensor:
        host = urlsplit(self.endpoint).hostname
        where = f"http://{host}:{port}"
        data, headers = ask(where, "GET", f"/states/{key}", None)
        try:
            rows, width = (int(number) for number in headers["X-States-Shape"].split(","))
            kind = TYPES[headers["X-States-Dtype"]]
        except (AttributeError, KeyError, ValueError) as error:
            raise NodeFailed(f"{where}: no shape and type of states in the answer: {error}") from error
        if not data or len(data) != rows * width * kind.itemsize:
            raise NodeFailed(f"{where}: states of shape {[rows, width]} have {len(data)} bytes: the answer was cut")
        return torch.frombuffer(bytearray(data), dtype=kind).view(rows, width)


def node_of(listed: dict[str, Any]) -> Node:
    """The node that a site lists: {"endpoint", "served_name"}, "kind", `pooling` where it says none, and perhaps
    "quantization"."""
    made = ServingNode if listed.get("kind", "pooling") == "serving" else Node
    return made(listed["endpoint"], listed["served_name"], listed.get("quantization"))
