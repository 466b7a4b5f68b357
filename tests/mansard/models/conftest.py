"""A very small Llama with a byte-level tokenizer, and a stage's context, for the tests of models and training.

torch and transformers are imported inside the functions: collecting tests stays quick.
"""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mansard.store.store import Store
from mansard.worker import Channel, StageContext

MakeLlama = Callable[..., Path]
MakeFamily = Callable[..., Path]
MakeContext = Callable[..., StageContext]


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> MakeLlama:
    """make_llama(seed=0, dtype="bfloat16", **config) -> a model directory with random weights, made once each."""
    made: dict[str, Path] = {}

    def make(seed: int = 0, dtype: str = "bfloat16", **config: Any) -> Path:
        key = json.dumps([seed, dtype, config], sort_keys=True)
        if key not in made:
            made[key] = _write_llama(tmp_path_factory.mktemp("llama"), seed, dtype, config)
        return made[key]

    return make


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def make_context(store: Store, tmp_path: Path) -> MakeContext:
    """make_context(inputs, spec) -> the context a worker would give the stage; progress goes nowhere."""
    count = 0

    def make(inputs: Mapping[str, str], spec: Mapping[str, Any]) -> StageContext:
        nonlocal count
        count += 1
        work = tmp_path / f"work-{count}"
        work.mkdir()
        return StageContext(store, f"{count:064x}", inputs, spec, {}, work, Channel(io.StringIO()))

    return make


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> MakeFamily:
    """make_family("qwen3", dtype="float32", **config) -> a folder with a very small model of the family, made once."""
    made: dict[str, Path] = {}

    def make(model_type: str, dtype: str = "float32", **config: Any) -> Path:
        key = json.dumps([model_type, dtype, config], sort_keys=True)
        if key not in made:
            made[key] = _write_family(tmp_path_factory.mktemp(model_type), model_type, dtype, config)
        return made[key]

    return make


FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8, "head_dim": 8},
    "qwen2": {"max_window_layers": 3},
    "qwen3": {"head_dim": 16, "max_window_layers": 3},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 8, "pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "sliding_window": 8},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2,
        "head_dim": 16, "norm_topk_prob": True,
    },
}  # fmt: skip


def _write_family(path: Path, model_type: str, dtype: str, config: dict[str, Any]) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 260, "max_position_embeddings": 128, "bos_token_id": None,
        "eos_token_id": 0, "tie_word_embeddings": False, "initializer_range": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    whole = AutoConfig.for_model(model_type, **{**shape, **FAMILY_CONFIGS[model_type], **config})
    model = AutoModelForCausalLM.from_config(whole, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start all alike, which would hide one that was not copied
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    _write_tokenizer(path)
    return path


def _write_llama(path: Path, seed: int, dtype: str, config: dict[str, Any]) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 260,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # transformers starts biases at zero, which would hide a bias left in a Pro block
            torch.nn.init.normal_(parameter, std=0.02)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    _write_tokenizer(path)
    return path


def _write_tokenizer(path: Path) -> None:
    """Byte-level BPE without merges: a token a byte, and <eos> is 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<eos>": 0, **{c: i for i, c in enumerate(alphabet, start=1)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
