"""KV connector that hands out the states of prompts that ask for it, from an engine that serves users.

A CarryOnStates... model keeps every token's states in a layer of the KV cache (models.py), so they are there for tokens
of the prefix cache, too. A request with `"kv_transfer_params": {"mansard_states": true}` gets, beside its answer,
{"mansard_states": {"port", "key"}}; its prompt's states are copied in the step that computes the prompt's last token,
before that answer, and wait for GET /states/KEY (held.py). Nothing is done for other requests.

Settings (kv_connector_extra_config): `port`, the first to try, so that several engines of a machine may say the same;
`host`, the address that listens (127.0.0.1); `held_bytes` of states that wait (1 GiB). Legend: N tokens of a prompt, W
all states' width.
"""

import uuid
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from mansard_vllm.held import Held, States, serve
from mansard_vllm.kept_states import NAME, KeptStates

ASKS = "mansard_states"
HELD_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Due:
    """A prompt that is computed to its end in this step: its key, tokens, and blocks of the states' layer."""

    key: str
    tokens: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Listens(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What the worker's side tells the scheduler's once: the port that it took."""

    port: int


@dataclass
class DueStates(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler's side tells the worker's with each step."""

    due: list[Due] = field(default_factory=list)


@dataclass(slots=True)
class _Asked:
    """A request that asks: the key under which its states will wait, and its prompt's tokens."""

    key: str
    tokens: int


class StatesConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One object on the scheduler's side, one on each worker's; tensor-parallel rank 0 hands out."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:  # noqa: ANN401
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1:
            raise ValueError("states are given without pipeline and data parallelism; use tensor parallelism")
        settings = self._kv_transfer_config.kv_connector_extra_config
        if not isinstance(settings.get("port"), int):
            raise ValueError("kv_connector_extra_config: port: the first port for states is expected, e.g. 8300")
        self.port = settings["port"]
        self.host = settings.get("host", "127.0.0.1")
        self.held = Held(settings.get("held_bytes", HELD_BYTES))
        self.asked: dict[str, _Asked] = {}
        self.layer: KeptStates | None = None
        groups = kv_cache_config.kv_cache_groups
        found = [i for i, group in enumerate(groups) if any(name.startswith(NAME) for name in group.layer_names)]
        if len(found) != 1:
            raise ValueError("the model keeps no states; give --hf-overrides architectures of CarryOnStates...")
        self.group = found[0]
        self.block_tokens = groups[self.group].kv_cache_spec.block_size

    @property
    def requires_kv_delivery(self) -> bool:
        """Never: states are copied before a request can be preempted for it."""
        return False

    # The scheduler's side.

    def set_xfer_handshake_metadata(self, metadata: dict[int, Listens]) -> None:
        """Where rank 0 listens, for the answers."""
        self.port = metadata[0].port

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:  # noqa: ANN401
        """Nothing is ever loaded."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:  # noqa: ANN401
        """Nothing is ever loaded."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> DueStates:
        """Which prompts that asked end in this step. A preempted one is computed, and due, again."""
        cached = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request in scheduler_output.scheduled_new_reqs:
            computed[request.req_id] = request.num_computed_tokens
            if _asks(request):
                self.asked.setdefault(request.req_id, _Asked(uuid.uuid4().hex, request.prompt_len))
        due = DueStates()
        for number in self.asked.keys() & computed.keys():
            asked = self.asked[number]
            before = computed[number]
            if before < asked.tokens <= before + scheduler_output.num_scheduled_tokens[number]:
                blocks = scheduler_output.kv_connector_block_state.get_block_ids(number)
                due.due.append(Due(asked.key, asked.tokens, list(blocks[self.group])))
        return due

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]  # noqa: ANN401
    ) -> tuple[bool, dict[str, Any] | None]:
        """Where the request's states wait; its blocks may go at once."""
        asked = self.asked.pop(request.request_id, None)
        return False, None if asked is None else {ASKS: {"port": self.port, "key": asked.key}}

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the layer, and listen."""
        self.layer = next(iter(get_layers_from_vllm_config(self._vllm_config, KeptStates, list(kv_caches)).values()))
        if get_tensor_model_parallel_rank() == 0:
            self.port = serve(self.held, self.host, self.port)

    def get_handshake_metadata(self) -> Listens | None:
        """The port, once."""
        return Listens(self.port) if get_tensor_model_parallel_rank() == 0 else None

    def wait_for_save(self) -> None:
        """Copy what is due; the step's forward pass is done, or queued before this on the same stream."""
        if not self.has_connector_metadata() or get_tensor_model_parallel_rank() != 0:
            return
        assert self.layer is not None, "registered before the first step"
        for due in self._get_connector_metadata().due:
            self.held.put(due.key, as_bytes(self.layer.read(due.blocks, self.block_tokens, due.tokens)))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Nothing is ever loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is ever loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """The model's own layer keeps the states."""


def as_bytes(states_NW: torch.Tensor) -> States:
    """As they travel."""
    values = states_NW.cpu().contiguous()
    data = memoryview(values.view(torch.uint8).numpy()).cast("B")
    return States(data, str(values.dtype).removeprefix("torch."), tuple(values.shape))


def _asks(request: NewRequestData) -> bool:
    extra = (request.sampling_params and request.sampling_params.extra_args) or {}
    return bool((extra.get("kv_transfer_params") or {}).get(ASKS)) and request.prompt_token_ids is not None
