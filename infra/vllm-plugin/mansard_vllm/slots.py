"""Many branches on one running base, chosen per request by model name: vLLM's LoRA requests, another manager.

A branch is loaded with POST /v1/load_lora_adapter {"lora_name", "lora_path"}: a folder with branch.safetensors and
alpha.json; it must be of the base and of the shape that the server was started with, or the answer is 400 with the
reason. Scheduling, /v1/models and the prefix cache's keys are vLLM's own. Slot 0 is the base. A step costs a pass over
each slot in use; CPU and eager GPU only (a captured graph needs a kernel of fixed shape).
"""

import json
import math
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mansard_vllm.branch import Branch, Groups, check_description, read_description
from mansard_vllm.refusals import marked

BRANCH_FILE, ALPHA_FILE = "branch.safetensors", "alpha.json"


class Slots:
    """Which branch is in which slot, and which slot each token of the step belongs to."""

    def __init__(self, branch: Branch, base: str, count: int, max_tokens: int) -> None:
        self.branch = branch
        self.base = base
        self.count = count
        self.alphas = [0.0] * (count + 1)
        self.slot_of: OrderedDict[int, int] = OrderedDict()  # adapter id -> slot, least recently used first
        self.paths: dict[int, Path] = {}
        self.index = torch.zeros(max_tokens, dtype=torch.long)
        self.num_tokens = 0

    def joined(self, positions_N: torch.Tensor, states_NW: torch.Tensor) -> torch.Tensor:
        """x + alpha g f, each token with its own branch; tokens without one, and padding, keep x."""
        x_ND = states_NW[:, : self.branch.shape["base_width"]]
        groups = self._groups(len(x_ND))
        if not groups:
            return x_ND
        delta_ND = self.branch(positions_N, states_NW, groups)
        alpha_N = torch.zeros(len(x_ND), 1, dtype=x_ND.dtype, device=x_ND.device)
        for slot, rows in groups:
            alpha_N[rows] = self.alphas[slot]
        return torch.where(alpha_N == 0.0, x_ND, x_ND + alpha_N * delta_ND)

    def register(self, adapter: int, path: Path) -> None:
        """Check a branch's folder and take it into a slot; ValueError in one line where it does not belong here."""
        described = read_description(path / BRANCH_FILE)
        check_description(described, self.base, self.branch.shape["base_width"], str(path))
        if differing := other_geometry(described["shape"], self.branch.shape):
            raise ValueError(f"{path}: a branch of {differing}; slots hold one shape, start an engine for it")
        self.paths[adapter] = path
        try:
            self.hold({adapter})
        except ValueError:
            del self.paths[adapter]
            raise

    def hold(self, adapters: Collection[int]) -> None:
        """Have all of these in slots; those used least recently make room. ValueError for one that cannot be read, and
        then no other has made room for it."""
        for adapter in adapters:
            if adapter in self.slot_of:
                self.slot_of.move_to_end(adapter)
                continue
            alpha = self._alpha_of(self.paths[adapter])
            free = set(range(1, self.count + 1)) - set(self.slot_of.values())
            victim = None if free else next(known for known in self.slot_of if known not in adapters)
            slot = min(free) if victim is None else self.slot_of[victim]
            self.branch.load(self.paths[adapter] / BRANCH_FILE, slot)
            if victim is not None:
                del self.slot_of[victim]
            self.alphas[slot], self.slot_of[adapter] = alpha, slot

    def assign(self, adapters_N: Collection[int]) -> None:
        """The adapter of every token of the coming step; 0 is none."""
        slots = [self.slot_of.get(adapter, 0) for adapter in adapters_N]
        self.index[: len(slots)] = torch.tensor(slots, dtype=torch.long)
        self.num_tokens = len(slots)

    def forget(self, adapter: int) -> bool:
        self.slot_of.pop(adapter, None)
        return self.paths.pop(adapter, None) is not None

    def _groups(self, tokens: int) -> Groups:
        index_N = self.index[: min(tokens, self.num_tokens)]
        return [(slot, (index_N == slot).nonzero()[:, 0]) for slot in index_N.unique().tolist() if slot != 0]

    @staticmethod
    def _alpha_of(path: Path) -> float:
        where = path / ALPHA_FILE
        try:
            alpha = json.loads(where.read_bytes())["alpha"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{where}: {{"alpha": NUMBER}} is expected ({type(error).__name__})') from error
        if not isinstance(alpha, int | float) or not 0 <= alpha < math.inf:
            raise ValueError(f"{where}: alpha {alpha!r}: a number from 0 up is expected")
        return float(alpha)


def other_geometry(branch: dict[str, Any], slots: dict[str, Any]) -> str:
    """In words where a branch's shape is not that of the slots (taps are part of it); nothing where it is."""
    keys = sorted(key for key in branch.keys() | slots.keys() if branch.get(key) != slots.get(key))
    of = {name: ", ".join(f"{k} {shape.get(k, 'none')}" for k in keys) for name, shape in (("b", branch), ("s", slots))}
    return f"{of['b']} where the server's slots have {of['s']}" if keys else ""


class BranchManager:
    """What vLLM's model runner asks in place of its own LoRA manager."""

    is_enabled = True

    def __init__(self) -> None:
        self._slots: Slots | None = None
        self._dummies: set[int] = set()

    @property
    def slots(self) -> Slots:
        assert self._slots is not None, "create_lora_manager comes first"
        return self._slots

    def create_lora_manager(self, model: Any, vllm_config: Any) -> Any:  # noqa: ANN401 - vLLM's own types
        self._slots = model.carry_on_slots
        lora = vllm_config.lora_config
        if lora.max_loras > self.slots.count:
            raise ValueError(f"--max-loras {lora.max_loras}: the artifact has {self.slots.count} slots for branches")
        return model

    def set_active_adapters(self, requests: Collection[Any], mapping: Any) -> None:  # noqa: ANN401
        wanted = {request.lora_int_id for request in requests} - self._dummies
        for request in requests:
            if request.lora_int_id in wanted and request.lora_int_id not in self.slots.paths:
                self.slots.register(request.lora_int_id, Path(request.lora_path))
        self.slots.hold(wanted)
        self.slots.assign(mapping.index_mapping)

    def add_adapter(self, request: Any) -> bool:  # noqa: ANN401
        if request.lora_int_id in self.slots.paths:
            return False
        try:
            self.slots.register(request.lora_int_id, Path(request.lora_path))
        except ValueError as error:
            raise marked(error) from error
        return True

    def remove_adapter(self, adapter: int) -> bool:
        return self.slots.forget(adapter)

    def pin_adapter(self, adapter: int) -> bool:
        raise ValueError("branches cannot be pinned; --max-loras says how many are held")

    def list_adapters(self) -> set[int]:
        return set(self.slots.paths)

    def remove_all_adapters(self) -> None:
        """After vLLM's warm-up, whose adapters exist in name only."""
        self._dummies.clear()
        for adapter in list(self.slots.paths):
            self.slots.forget(adapter)

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def add_dummy_lora(self, request: Any, rank: int) -> bool:  # noqa: ANN401
        self._dummies.add(request.lora_int_id)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        return False


def use_branch_manager() -> None:
    """Models with slots for branches get this manager; every other model keeps vLLM's."""
    from vllm.v1.worker import lora_model_runner_mixin as runner

    original = runner.LRUCacheWorkerLoRAManager
    if getattr(original, "is_carry_on", False):
        return

    def manager(vllm_config: Any, device: Any, embedding_modules: Any) -> Any:  # noqa: ANN401
        section = getattr(vllm_config.model_config.hf_config, "carry_on", None) or {}
        return BranchManager() if "slots" in section else original(vllm_config, device, embedding_modules)

    manager.is_carry_on = True  # type: ignore[attr-defined]
    runner.LRUCacheWorkerLoRAManager = manager
