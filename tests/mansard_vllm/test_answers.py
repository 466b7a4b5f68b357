"""What the vLLM plugin adds to the API server's answers, read from vLLM's own configuration; no engine is started."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from mansard_vllm.refusals import line_in, marked

from mansard.demo.base import save_base, train_tokenizer, untrained_model

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"vocabulary": 300, "hidden": 128, "intermediate": 256, "blocks": 2, "heads": 2, "max_tokens": 128}
METHODS = {
    "plain": None,
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "packed": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
}
ASK = """
import json, sys
from mansard_vllm.told_cards import quantization_of
from vllm.config import ModelConfig
asked = json.load(sys.stdin)
print(json.dumps([quantization_of(ModelConfig(model=m, dtype="bfloat16", quantization=q)) for m, q in asked]))
"""


def test_a_refusal_is_found_in_the_words_that_engine_and_worker_put_around_it() -> None:
    line = "/branches/a: a branch for width 64, the base has 128"
    told = f"Call to add_lora method failed: Worker failed with error '{marked(ValueError(line))}', please check above"
    assert line_in(told) == line
    assert line_in("Call to add_lora method failed: out of memory") is None


@pytest.mark.slow
def test_a_card_names_the_checkpoints_method_else_that_of_the_command_line_else_none(tmp_path: Path) -> None:
    for name, method in METHODS.items():
        folder = tmp_path / name
        save_base(untrained_model(SHAPE, 0), train_tokenizer(["a b c " * 50], SHAPE["vocabulary"], 64), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method} if method else config))
    asked = [("plain", None), ("plain", "fp8"), ("awq", None), ("packed", None)]
    run = subprocess.run(
        [ROOT / ".venv-serve/bin/python", "-c", ASK],
        input=json.dumps([(str(tmp_path / name), argument) for name, argument in asked]),
        capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT / "infra/vllm-plugin"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == ["none", "fp8", "awq", "compressed-tensors"]
