"""Several processes that move one model's weights: DeepSpeed's ZeRO 1, 2 and 3 behind the loop's engine.

Every rank knows the whole batch of a step and takes its own rows of it, so any number of ranks sees the same data; the
loss is over the labels of the whole batch. In ZeRO 3 frozen parameters are sharded too and gathered block by block,
which every rank must take part in: so all of them evaluate the same held-out rows. Checkpoints hold whole tensors under
the parameters' names, the same as one process writes, and resume on any number of ranks. Sources: ZeRO (Rajbhandari et
al. 2020); the way to whole masters and moments is deepspeed.utils.tensor_fragment.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import distributed, nn

from mansard.models.freeze import digest_tensors
from mansard.specs.training import Train
from mansard.training.adamw import BETAS, EPSILON, set_rates
from mansard.training.anchor import Anchor
from mansard.training.data import Batch
from mansard.training.engines import Loss, ModelEngine
from mansard.training.optimizer import Group, torch_groups
from mansard.training.packing import IGNORED
from mansard.training.ranks import zero_level
from mansard.training.state import random_states, take_random_states

MOMENTS = ("exp_avg", "exp_avg_sq")
Beat = Callable[[str], None]
"""Told what a rank is about to do: the one that is behind when all stand still is the one that hangs."""


class DeepSpeedEngine(ModelEngine):
    """One rank of several. `config` is DeepSpeed's own, without what the spec says (rates, clipping, types);
    `ranks.check_ranks` has looked at both."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a transformers model; modified
        groups: Sequence[Group],
        train: Train,
        config: Mapping[str, Any],
        beat: Beat,
        anchor: Anchor | None = None,
    ) -> None:
        self._rank, self._world = distributed.get_rank(), distributed.get_world_size()
        rows = train.batch_sequences // self._world
        micro_batch = min(train.micro_batch_sequences or rows, rows)
        super().__init__(model, micro_batch, anchor)
        self._beat = beat
        self._is_sharded = zero_level(config) == 3
        self._parameters = {name: p for g in groups for name, p in g.parameters.items()}
        # ZeRO 3 gathers a module's own parameters for its pass; the loss reads the head's beside that.
        deepspeed.zero.register_external_parameter(self.module, model.get_output_embeddings().weight)
        wanted = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": -(-rows // micro_batch),
            "gradient_clipping": train.clip_norm,
            "zero_allow_untested_optimizer": True,
            **({"bf16": {"enabled": True}} if train.precision == "bf16" else {}),
        }
        moved = torch_groups(groups, self._parameters, train.weight_decay)
        self.module, self._zero, _, _ = deepspeed.initialize(
            model=self.module,
            optimizer=torch.optim.AdamW(moved, betas=BETAS, eps=EPSILON),
            config={**config, **wanted},
        )
        self._steps = 0.0
        self._make_moments(0.0)
        self.objective.decoder.compile()

    def gradients(self, batch: Batch) -> Loss:
        """Forward and backward of this rank's rows; the loss is the whole batch's."""
        self._beat("gradients")
        self.module.train()
        labels = int((batch.labels_BT != IGNORED).sum())
        sums = torch.zeros(2, device=self.device)
        parts = batch.of_rank(self._rank, self._world).parts(self.micro_batch_sequences)
        for number, part in enumerate(parts):
            sums_of_part = self.module(part)
            self.module.backward(self.objective.weighed(sums_of_part) * (self._world / labels), scale_wrt_gas=False)
            sums += sums_of_part.detach()
            if number < len(parts) - 1:
                self.module.step()  # counts a micro-batch; weights move at the last one's
        self._beat("losses")
        distributed.all_reduce(sums)
        return Loss(float(sums[0]), labels, float(sums[1]))

    def step(self, factor: float) -> float:
        self._beat("step")
        set_rates(self._zero, factor)
        self.module.step()
        self._steps += 1.0
        return float(self.module.get_global_grad_norm())

    def evaluate(self, batches: Sequence[Batch]) -> Loss:
        self._beat("evaluate")
        return super().evaluate(batches)

    def trained(self) -> dict[str, torch.Tensor]:
        return {name: self._master(p).float().cpu() for name, p in self._parameters.items()}

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        parameters = dict(self.objective.model.named_parameters(remove_duplicate=False))
        for name in names:
            with self._whole([parameters[name]] if name in parameters else []):
                found |= digest_tensors(self.objective.model, [name])
        return found

    def state(self) -> dict[str, torch.Tensor]:
        """What one process would write. Every rank takes part, whoever writes it."""
        self._beat("state")
        tensors = random_states()
        for name, parameter in self._parameters.items():
            tensors[f"master/{name}"] = self._master(parameter).cpu()
            for moment in MOMENTS:
                tensors[f"{moment}/{name}"] = safe_get_full_optimizer_state(parameter, moment).cpu()
            tensors[f"step/{name}"] = torch.tensor(self._steps)
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        told = take_random_states(tensors)
        self._make_moments(max((float(v) for key, v in told.items() if key.startswith("step/")), default=0.0))
        for name, parameter in self._parameters.items():
            master = told[f"master/{name}"].to(self.device)
            safe_set_full_fp32_param(parameter, master)
            for moment in MOMENTS if self._steps else ():
                safe_set_full_optimizer_state(parameter, told[f"{moment}/{name}"].to(self.device), moment)
            with torch.no_grad(), self._whole([parameter], modifier_rank=0):
                parameter.copy_(master)

    def _make_moments(self, steps: float) -> None:
        """Moments of zero that count `steps` steps. Before the first step, because DeepSpeed 0.19 links parameters to
        moments once, when only those of the first group are there."""
        self._steps = steps
        inner, sharded = self._zero.optimizer, "fp32_partitioned_groups_flat"
        flats = getattr(self._zero, sharded if self._is_sharded else "single_partition_of_fp32_groups")
        for flat in flats:
            inner.state[flat] = {"step": torch.tensor(steps), **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
        if not self._is_sharded:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _whole(self, parameters: list[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager[Any]:
        """Has sharded parameters whole while it lasts."""
        if not self._is_sharded or not parameters:
            return nullcontext()
        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank)
        return gathered

    def _master(self, parameter: nn.Parameter) -> torch.Tensor:
        """The whole float32 master of a parameter, wherever its pieces are."""
        value = safe_get_full_fp32_param(parameter)
        assert value is not None, "ZeRO holds a master of every trained parameter"
        return value

