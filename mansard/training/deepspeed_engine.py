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

from mansard.errors import BadInput
from mansard.models.freeze import digest_tensors
from mansard.specs import Train
from mansard.training.adamw import BETAS, EPSILON, set_rates
from mansard.training.attention import use_packed_attention
from mansard.training.data import Batch
from mansard.training.decoder import Decoder
from mansard.training.engines import LocalEngine, Loss
from mansard.training.head_loss import HeadLoss
from mansard.training.optimizer import Group
from mansard.training.packing import IGNORED
from mansard.training.state import random_states, take_random_states

MOMENTS = ("exp_avg", "exp_avg_sq")
Beat = Callable[[str], None]
"""Told what a rank is about to do: the one that is behind when all stand still is the one that hangs."""


def check_ranks(train: Train, config: Mapping[str, Any], world: int) -> None:
    """BadInput where the spec's training cannot run on `world` ranks under this DeepSpeed configuration."""
    level = config.get("zero_optimization", {}).get("stage", 0)
    if train.batch_sequences % world:
        raise BadInput(
            f"train.batch_sequences {train.batch_sequences} is no multiple of the site's training.processes {world}"
        )
    if train.frozen == "fp8" and level == 3:
        raise BadInput("train.frozen: fp8 needs ZeRO 1 or 2 (its weights are buffers, which ZeRO 3 does not shard); "
                       "name another file under training.deepspeed, or frozen: bf16")  # fmt: skip
    if (train.optimizer, train.master) != ("adamw", "fp32"):
        raise BadInput(f"optimizer: {train.optimizer} with master: {train.master} runs in one process; several ranks "
                       "take optimizer: adamw and master: fp32")  # fmt: skip


class DeepSpeedEngine(LocalEngine):
    """One rank of several. `config` is DeepSpeed's own, without what the spec says (rates, clipping, types)."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a transformers model; modified
        groups: Sequence[Group],
        train: Train,
        config: Mapping[str, Any],
        beat: Beat,
    ) -> None:
        self._rank, self._world = distributed.get_rank(), distributed.get_world_size()
        check_ranks(train, config, self._world)
        self._model = model
        self._beat = beat
        rows = train.batch_sequences // self._world
        self.micro_batch_sequences = min(train.micro_batch_sequences or rows, rows)
        use_packed_attention(model)
        self.decoder = Decoder(model)
        softcap = getattr(model.config, "final_logit_softcapping", None)
        self._is_sharded = config.get("zero_optimization", {}).get("stage", 0) == 3
        self._head_loss = HeadLoss(model.get_output_embeddings(), softcap, self._accelerator())
        self._parameters = {name: p for g in groups for name, p in g.parameters.items()}
        wanted = {
            "train_micro_batch_size_per_gpu": self.micro_batch_sequences,
            "gradient_accumulation_steps": -(-rows // self.micro_batch_sequences),
            "gradient_clipping": train.clip_norm,
            "zero_allow_untested_optimizer": True,
            **({"bf16": {"enabled": True}} if train.precision == "bf16" else {}),
        }
        self._deepspeed, optimizer, _, _ = deepspeed.initialize(
            model=_Objective(self, model),
            optimizer=torch.optim.AdamW(_torch_groups(groups, train.weight_decay), betas=BETAS, eps=EPSILON),
            config={**config, **wanted},
        )
        self._zero = optimizer
        self._steps = 0.0
        self._make_moments(0.0)
        self.decoder.compile()

    def forecast_text(self, forecast: Callable[[], str]) -> str:
        """None is made: the preflight measures one process."""
        return f"{self._world} ranks, memory is not forecast for several"

    def gradients(self, batch: Batch) -> Loss:
        """Forward and backward of this rank's rows; the loss is the whole batch's."""
        self._beat("gradients")
        self._deepspeed.train()
        labels = int((batch.labels_BT != IGNORED).sum())
        nats = torch.zeros((), device=self.device)
        parts = self._rows_of_rank(batch).parts(self.micro_batch_sequences)
        for number, part in enumerate(parts):
            nats_of_part = self._deepspeed(part)
            self._deepspeed.backward(nats_of_part * (self._world / labels), scale_wrt_gas=False)
            nats += nats_of_part.detach()
            if number < len(parts) - 1:
                self._deepspeed.step()  # counts a micro-batch; weights move at the last one's
        self._beat("losses")
        distributed.all_reduce(nats)
        return Loss(float(nats), labels)

    def step(self, factor: float) -> float:
        self._beat("step")
        set_rates(self._zero, factor)
        self._deepspeed.step()
        self._steps += 1.0
        return float(self._deepspeed.get_global_grad_norm())

    def evaluate(self, batches: Sequence[Batch]) -> Loss:
        self._beat("evaluate")
        self._deepspeed.eval()
        parts = [part for batch in batches for part in batch.parts(self.micro_batch_sequences)]
        with torch.no_grad():
            nats = sum(float(self._deepspeed(part)) for part in parts)
        return Loss(nats, sum(int((part.labels_BT != IGNORED).sum()) for part in parts))

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        self._deepspeed.eval()
        positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
        with torch.no_grad():
            logits_BTV: torch.Tensor = self._deepspeed(Batch(tokens_BT, positions_BT, tokens_BT), wants_logits=True)
        return logits_BTV.cpu()

    def trained(self) -> dict[str, torch.Tensor]:
        return {name: self._master(p).float().cpu() for name, p in self._parameters.items()}

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        for name in names:
            with self._whole([parameters[name]] if name in parameters else []):
                found |= digest_tensors(self._model, [name])
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

    def _rows_of_rank(self, batch: Batch) -> Batch:
        rows = len(batch.tokens_BT) // self._world
        mine = slice(self._rank * rows, (self._rank + 1) * rows)
        return Batch(batch.tokens_BT[mine], batch.positions_BT[mine], batch.labels_BT[mine])

    @staticmethod
    def _accelerator() -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class _Objective(nn.Module):
    """Model and loss as one module, so that ZeRO 3 gathers what each part of it needs."""

    def __init__(self, engine: DeepSpeedEngine, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        object.__setattr__(self, "_engine", engine)  # no submodule
        head = model.get_output_embeddings()
        deepspeed.zero.register_external_parameter(self, head.weight)

    def bfloat16(self) -> "_Objective":
        """DeepSpeed asks for it; the model is in its types already, FP8 weights and their scales among them."""
        return self

    def forward(self, batch: Batch, wants_logits: bool = False) -> torch.Tensor:
        hidden_BTH = self._engine.hidden(batch)
        if wants_logits:
            return self._engine._head_loss.logits(hidden_BTH)
        return self._engine.nats(hidden_BTH, batch.labels_BT)


def _torch_groups(groups: Sequence[Group], weight_decay: float) -> list[dict[str, Any]]:
    """As MasterAdamW's: matrices take weight decay, vectors do not."""
    made = []
    for group in groups:
        members = list(group.parameters.values())
        matrices, vectors = [p for p in members if p.ndim >= 2], [p for p in members if p.ndim < 2]
        for chosen, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if chosen:
                rates = {"lr": group.peak_rate, "peak_rate": group.peak_rate, "weight_decay": decay}
                made.append({"params": chosen, **rates})
    return made
