"""The stages: which module derives what, read without importing it (flows and tasks never load torch).

A stage's module declares `CODE_VERSION` (an integer, raised when the code changes what comes out) and `PACKAGES` (the
distributions whose versions belong to its recipe), and defines `run(context: StageContext) -> SnapshotId`.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

STAGES = {
    "corpus": "mansard.demo.corpus_stage",
    "pretrain": "mansard.demo.pretrain_stage",
    "check": "mansard.models.check_stage",
    "importance": "mansard.models.importance_stage",
    "expand": "mansard.models.expand_stage",
    "prove": "mansard.models.prove_stage",
    "tokenize": "mansard.training.tokenize_stage",
    "train": "mansard.training.stage",
    "remove-storey": "mansard.models.remove_storey_stage",
    "fuse": "mansard.models.fuse_stage",
    "average": "mansard.models.average_stage",
    "kept-gain": "mansard.training.kept_gain_stage",
    "quantize": "mansard.models.quantize_stage",
    "capture": "mansard.carry_on.capture_stage",
    "train-branch": "mansard.carry_on.train_stage",
    "compose": "mansard.carry_on.compose_stage",
    "evaluate": "mansard.evaluation.evaluate_stage",
    "fingerprint": "mansard.evaluation.fingerprint_stage",
    "cost": "mansard.evaluation.cost_stage",
    "contamination": "mansard.evaluation.contamination_stage",
    "judge": "mansard.evaluation.judge_stage",
}


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a stage's file says of itself."""

    module: str
    file: Path
    code_version: int
    packages: tuple[str, ...]


def declaration(stage: str) -> Declaration:
    """Read the two constants from the stage's source; KeyError for an unknown stage.

    By pattern, not by `ast`: tasks run in threads, CPython 3.11 counts the depth of all threads' parsers together, and
    an upgrade ended in "SystemError: AST constructor recursion depth mismatch" (seen 2026-11-25).
    """
    module = STAGES[stage]
    found = find_spec(module)
    assert found is not None and found.origin is not None, f"stage {stage}: no module {module}"
    file = Path(found.origin)
    source = file.read_text()
    version = re.search(r"^CODE_VERSION = (\d+)$", source, re.MULTILINE)
    packages = re.search(r"^PACKAGES = \(([^)]*)\)$", source, re.MULTILINE)
    assert version is not None and packages is not None, f"stage {stage}: {file} declares no CODE_VERSION or PACKAGES"
    return Declaration(module, file, int(version[1]), tuple(re.findall(r'"([^"]+)"', packages[1])))
