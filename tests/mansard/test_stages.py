"""A stage whose code changed has a new code version, so that no old snapshot answers for new code."""

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from mansard.stages import STAGES, declaration


def stage_versions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stage_versions", Path(__file__).with_name("stage_versions.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stage", STAGES)
def test_changed_stage_code_has_a_new_code_version(stage: str) -> None:
    module = stage_versions()
    version, digest = json.loads(module.RECORD.read_text())[stage]
    changed = module.stage_digest(stage) != digest
    raised = declaration(stage).code_version > version
    assert not changed or raised, f"stage {stage} changed: raise its CODE_VERSION, then run: make stage-versions"
    assert not raised, f"stage {stage}: record its CODE_VERSION with: make stage-versions"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_name_can_be_the_key_of_a_prefect_artifact(stage: str) -> None:
    assert re.fullmatch(r"[a-z0-9-]+", stage)


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_declares_is_what_python_reads_in_its_file(stage: str) -> None:
    found = declaration(stage)
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(found.file.read_text()).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("CODE_VERSION", "PACKAGES")
    }
    assert constants == {"CODE_VERSION": found.code_version, "PACKAGES": found.packages}
