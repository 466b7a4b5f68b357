"""The branch inside vLLM: the arithmetic of mansard.carry_on.branch, with vLLM's attention and KV cache.

Weights are plain tensors on every rank: quantization and tensor parallelism are the base's, a branch is small.
Legend: N tokens of a step, D base width, W all states' width (x first, then the taps), d branch width, H heads, K head
width.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.functional import linear, rms_norm, silu
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

FORMAT = 1
METADATA = "carry_on"


Groups = list[tuple[int, Any]]
"""Which tokens of a step belong to which slot: (slot, indices of tokens, or `ALL` where it is everyone)."""
ALL = slice(None)


class Block(nn.Module):  # type: ignore[misc]
    """`number` is the layer's number in vLLM, behind the base's layers: names must hold exactly one integer. Keys and
    values of every slot's tokens share the layer's KV cache: a request belongs to one slot."""

    def __init__(self, shape: dict[str, Any], vllm_config: VllmConfig, number: int, slots: int) -> None:
        super().__init__()
        self.shape = shape
        width, wide = shape["width"], shape["heads"] * shape["head_width"]
        self.attention_norm = _weights(slots, width)
        self.qkv = _weights(slots, 3 * wide, width)
        self.attention_output = _weights(slots, width, wide)
        self.mlp_norm = _weights(slots, width)
        self.gate_up = _weights(slots, 2 * shape["intermediate"], width)
        self.down = _weights(slots, width, shape["intermediate"])
        self.attention = Attention(
            shape["heads"],
            shape["head_width"],
            shape["head_width"] ** -0.5,
            num_kv_heads=shape["heads"],
            cache_config=vllm_config.cache_config,
            quant_config=None,
            prefix=f"carry_on.blocks.{number}.attention",
        )

    def forward(
        self, h_Nd: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], groups: Groups
    ) -> torch.Tensor:
        shape = self.shape
        heads = (len(h_Nd), shape["heads"], shape["head_width"])

        def before(slot: int, h: torch.Tensor) -> torch.Tensor:
            return linear(_norm(h, self.attention_norm[slot], shape), self.qkv[slot])

        def after(slot: int, h: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
            h = h + linear(mixed, self.attention_output[slot])
            gate, up = linear(_norm(h, self.mlp_norm[slot], shape), self.gate_up[slot]).chunk(2, dim=-1)
            return h + linear(silu(gate) * up, self.down[slot])

        q, k, v = by_group(groups, before, h_Nd).chunk(3, dim=-1)
        q = _rotate(q.reshape(heads), *rotation).flatten(1)
        k = _rotate(k.reshape(heads), *rotation).flatten(1)
        return by_group(groups, after, h_Nd, self.attention(q, k, v.contiguous()))


class Branch(nn.Module):  # type: ignore[misc]
    """States W wide -> g * f, D wide. Every weight has a row a slot; a token whose slot holds nothing gets 0."""

    def __init__(self, shape: dict[str, Any], vllm_config: VllmConfig, slots: int = 1) -> None:
        super().__init__()
        self.shape = shape
        width, base_width = shape["width"], shape["base_width"]
        first = vllm_config.model_config.hf_text_config.num_hidden_layers
        self.project = _weights(slots, width, base_width)
        self.blocks = nn.ModuleList(Block(shape, vllm_config, first + i, slots) for i in range(shape["blocks"]))
        self.norm = _weights(slots, width)
        self.output = _weights(slots, base_width, width)
        self.mixer = _weights(slots, base_width, width)
        self.taps = tuple(shape.get("taps", ()))
        if self.taps:
            self.tap_weights = _weights(slots, 1 + len(self.taps))
        if shape.get("tap_projections"):
            self.tap_projects = nn.ParameterList(_weights(slots, width, base_width) for _ in self.taps)
        elif self.taps:
            self.tap_norms = nn.ParameterList(_weights(slots, base_width) for _ in range(1 + len(self.taps)))

    def forward(self, positions_N: torch.Tensor, states_NW: torch.Tensor, groups: Groups) -> torch.Tensor:
        h_Nd = by_group(groups, self._read, states_NW)
        rotation = self._rotation(positions_N, h_Nd.dtype)
        for block in self.blocks:
            h_Nd = block(h_Nd, rotation, groups)

        def outputs(slot: int, h: torch.Tensor) -> torch.Tensor:
            last = _norm(h, self.norm[slot], self.shape)
            return torch.sigmoid(linear(last, self.mixer[slot])) * linear(last, self.output[slot])

        return by_group(groups, outputs, h_Nd)

    def _read(self, slot: int, states_NW: torch.Tensor) -> torch.Tensor:
        if not self.taps:
            return linear(states_NW, self.project[slot])
        parts, epsilon = states_NW.chunk(1 + len(self.taps), dim=-1), self.shape["norm_epsilon"]
        if self.shape.get("tap_projections"):
            pairs = zip(parts, [self.project, *self.tap_projects], strict=True)
            return self._weighted(slot, [linear(rms_norm(p, p.shape[-1:], None, epsilon), w[slot]) for p, w in pairs])
        normed = [rms_norm(p, p.shape[-1:], w[slot], epsilon) for p, w in zip(parts, self.tap_norms, strict=True)]
        return linear(self._weighted(slot, normed), self.project[slot])

    def _weighted(self, slot: int, parts: list[torch.Tensor]) -> torch.Tensor:
        shares = self.tap_weights[slot].float().softmax(0).to(parts[0].dtype)
        return torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(0)

    def load(self, path: Path, slot: int = 0) -> set[str]:
        """Fill a slot from the file; ValueError names what is missing, left over, misshapen or not finite, and then
        the slot is as it was.

        vLLM itself would start an AWQ base without a branch's weights and serve NaN.
        """
        wanted = dict(self.named_parameters())
        with opened(path) as file:
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if wrong := wanted.keys() ^ values.keys():
            raise ValueError(f"{path}: tensors missing or left over, e.g. {min(wrong)}; make the branch again")
        for name, value in values.items():
            shape = wanted[name].shape[1:]
            if value.shape != shape or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{path}: {name}: {list(shape)} finite values are expected, shape {list(value.shape)}")
        for name, value in values.items():
            wanted[name].data[slot].copy_(value)
        return set(values)

    def _rotation(self, positions_N: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.shape["head_width"] // 2
        powers = torch.arange(half, dtype=torch.float32, device=positions_N.device) / half
        angles = positions_N[:, None, None].float() * self.shape["rope_theta"] ** -powers
        return angles.cos().to(dtype), angles.sin().to(dtype)


def by_group(groups: Groups, apply: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`apply(slot, *rows of the tensors)` for every group, put together; rows of no group are 0."""
    if len(groups) == 1 and groups[0][1] is ALL:
        return apply(groups[0][0], *tensors)
    made: torch.Tensor | None = None
    for slot, rows in groups:
        found = apply(slot, *(t[rows] for t in tensors))
        if made is None:
            made = found.new_zeros(len(tensors[0]), found.shape[-1])
        made[rows] = found
    assert made is not None, "a step without groups does not run the branch"
    return made


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The branch's file; ValueError where it is not there or cannot be read."""
    if not path.is_file():
        raise ValueError(f"{path}: the branch is not there; compose the artifact again")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: the branch cannot be read ({error!s:.100}); compose the artifact again") from error


def read_description(path: Path) -> dict[str, Any]:
    """What the branch file says of itself; ValueError where it is none, or of a newer format."""
    with opened(path) as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        raise ValueError(f"{path}: no {METADATA!r} in its metadata; a branch that mansard customize made is expected")
    described: dict[str, Any] = json.loads(text)
    if described.get("format") != FORMAT:
        raise ValueError(f"{path}: branch format {described.get('format')!r}; this plugin reads format {FORMAT}")
    return described


def check_description(described: dict[str, Any], base: str, width: int, where: str) -> None:
    """ValueError where the branch belongs to another base, or to another width."""
    if described["base"] != base:
        raise ValueError(f"{where}: this branch belongs to base {described['base'][:12]}, the server's is {base[:12]}")
    if described["shape"]["base_width"] != width:
        raise ValueError(f"{where}: a branch for width {described['shape']['base_width']}, the base has {width}")
    if described["shape"].get("others"):
        raise ValueError(f"{where}: a branch on several bases; vLLM serves branches on one")


def _rotate(heads_NHK: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = heads_NHK.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def _norm(h_Nd: torch.Tensor, weight: torch.Tensor, shape: dict[str, Any]) -> torch.Tensor:
    return rms_norm(h_Nd, (shape["width"],), weight, shape["norm_epsilon"])


def _weights(slots: int, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(slots, *shape), requires_grad=False)
