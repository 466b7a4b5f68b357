"""Run by the serving environment's Python: loads the folders named on standard input into the plugin's slots, one after
the other, and prints what was said of each and what is held then. Arguments: base model, base digest, shape as JSON."""

import json
import sys
from pathlib import Path

from mansard_vllm.branch import Branch
from mansard_vllm.slots import Slots
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config


def main() -> None:
    model, base, shape = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    config = VllmConfig(model_config=ModelConfig(model=model, dtype="float32"))
    with set_current_vllm_config(config):
        branch = Branch(shape, config, 2)
    slots, said = Slots(branch, base, 1, 16), []
    for number, folder in enumerate(json.load(sys.stdin), start=1):
        try:
            slots.register(number, Path(folder))
            words = "taken"
        except ValueError as error:
            words = str(error)
        total = sum(float(p.data[1].abs().sum()) for p in branch.parameters())
        said.append([words, sorted(slots.paths), dict(slots.slot_of), slots.alphas[1], total])
    print(json.dumps(said))


if __name__ == "__main__":
    main()
