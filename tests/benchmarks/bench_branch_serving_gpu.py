"""What branches cost where they are served: a 7B shape alone, with one 100 M branch, and with several, on one GPU.

Real vLLM engines with dummy weights in bf16, one after the other, asked directly; random prompts of token ids. With
CUDA graphs: the base, and base + branch as one model. Eager, as slots are served: the base, then 1, 4 and 16 branches
of one engine in turn among the requests. The last line is JSON: decoding tokens/s of a user at each load, and for each
engine the time per output token over the base's. --slots-only leaves the engines with graphs out. --tiny: a small
shape, to try the plumbing on a CPU.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_serving_gpu import FULL, TINY, engine, load, write_model

from mansard.carry_on.branch import Branch
from mansard.carry_on.branch_file import branch_bytes
from mansard.composition.description import BranchDescription
from mansard.composition.shape import BranchShape, shape_of_size

BASE = "0" * 64
SEVERAL = (1, 4, 16)
PARAMETERS = {False: 100_000_000, True: 200_000}


def with_branch(model: Path, section: dict[str, Any]) -> None:
    """The base's folder becomes a carry-on's."""
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["CarryOnLlamaForCausalLM"], "carry_on": {"format": 1, "base": BASE, **section}}
    (model / "config.json").write_text(json.dumps(config))


def branch_file(shape: BranchShape) -> bytes:
    torch.manual_seed(0)
    branch = Branch(shape)
    tensors = {name: torch.randn_like(p) * 0.01 for name, p in branch.named_parameters()}
    return branch_bytes(BranchDescription(BASE, shape, 1.0), tensors, torch.bfloat16)


class Bench:
    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.ports = options, work, iter(range(options.port, options.port + 20))
        self.shape = (TINY if options.tiny else FULL) | ({} if options.tiny else {"num_hidden_layers": 32})
        self.branch = shape_of_size(self.shape["hidden_size"], PARAMETERS[options.tiny])
        self.file = branch_file(self.branch)

    def model(self, name: str, section: dict[str, Any] | None) -> Path:
        folder = self.work / name
        write_model(folder, self.shape, is_quantized=False)
        if section is not None:
            with_branch(folder, section)
            (folder / "carry_on").mkdir()
            (folder / "carry_on/branch.safetensors").write_bytes(self.file)
        return folder

    def rates(self, name: str, section: dict[str, Any] | None, *arguments: str) -> dict[str, float]:
        """Decoding tokens/s of a user, by the number of users."""
        with self._engine(self.model(name, section), arguments) as url:
            return self.loads(name, url, ["bench"])

    def loads(self, name: str, url: str, models: list[str]) -> dict[str, float]:
        prompt, output = (32, 8) if self.options.tiny else (256, 128)
        asyncio.run(load(url, 2, 2 * len(models), prompt, output, models))
        found = {}
        for users in self.options.users:
            seen = asyncio.run(load(url, users, max(6, 3 * users), prompt, output, models))
            found[str(users)] = seen["decode_tokens_per_second"]
        print(name, found, flush=True)
        return found

    def slots(self) -> dict[str, dict[str, float]]:
        """Several branches on one engine, the first k of them asked in turn."""
        count = max(SEVERAL)
        model = self.model("slots", {"slots": count, "shape": self.branch.as_json()})
        arguments = ["--enforce-eager", "--enable-lora", f"--max-loras={count}", f"--max-cpu-loras={2 * count}"]
        os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        with self._engine(model, [*arguments, "--max-lora-rank=8"]) as url:
            found = {"slots_none": self.loads("slots_none", url, ["bench"])}
            for number in range(count):
                self._load_branch(url, f"b{number}")
            for several in SEVERAL:
                name = f"slots_{several}"
                found[name] = self.loads(name, url, [f"b{number}" for number in range(several)])
        return found

    def _load_branch(self, url: str, name: str) -> None:
        folder = self.work / name
        folder.mkdir()
        (folder / "branch.safetensors").write_bytes(self.file)
        (folder / "alpha.json").write_text('{"alpha": 1.0}')
        body = json.dumps({"lora_name": name, "lora_path": str(folder)}).encode()
        request = urllib.request.Request(f"{url}/v1/load_lora_adapter", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120):
            pass

    @contextlib.contextmanager
    def _engine(self, model: Path, arguments: Any) -> Iterator[str]:
        every = [*self.options.engine_argument, *arguments]
        with engine(self.options.python, model, next(self.ports), every) as url:
            yield url


def over(base: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Time per output token over the base's."""
    return {users: round(base[users] / other[users], 3) for users in base}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="of the environment that holds vLLM and the plugin")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--port", type=int, default=18_800)
    parser.add_argument("--engine-argument", action="append", default=[], help="--engine-argument=--X, passed to vLLM")
    parser.add_argument("--slots-only", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    one = {"file": "carry_on/branch.safetensors", "alpha": 1.0, "branch": BASE}
    with tempfile.TemporaryDirectory(prefix="bench-branches-") as name:
        bench = Bench(options, Path(name))
        figures, ratios = {}, {}
        if not options.slots_only:
            figures = {"base": bench.rates("base", None), "one_branch": bench.rates("one_branch", one)}
            ratios = {"one_branch": over(figures["base"], figures["one_branch"])}
        figures["eager_base"] = bench.rates("eager_base", None, "--enforce-eager")
        figures |= bench.slots()
    ratios |= {name: over(figures["eager_base"], f) for name, f in figures.items() if name.startswith("slots")}
    print(json.dumps({"branch_parameters": bench.branch.parameters, "tokens_per_second": figures,
                      "time_per_token_ratio": ratios}))  # fmt: skip


if __name__ == "__main__":
    main()
