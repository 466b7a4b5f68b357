import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "vllm", "llmcompressor", "lm_eval", "deepspeed")


def loaded_by(*modules: str) -> set[str]:
    """Top-level modules in memory after importing `modules` in a fresh interpreter."""
    code = f"import json, sys\nfor m in {modules!r}: __import__(m)\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_flows_and_tasks_load_no_model_code() -> None:
    loaded = loaded_by(
        "flows.upgrade", "flows.adopt", "flows.gate", "flows.remove_storey", "flows.release", "flows.rollback",
        "flows.serve", "tasks.mirror",
    )
    assert not loaded & set(HEAVY)
    assert {"prefect", "mlflow"} <= loaded


@pytest.mark.parametrize("module", ["flows.stack", "tasks.intake", "tasks.evidence", "tasks.terminal"])
def test_what_runs_before_the_servers_loads_neither_prefect_nor_mlflow(module: str) -> None:
    assert not loaded_by(module) & {"prefect", "mlflow", *HEAVY}


def test_the_figures_of_cost_load_no_scipy() -> None:
    assert "scipy" not in loaded_by("mansard.evaluation.cost")


def test_flows_and_tasks_come_from_this_checkout() -> None:
    import flows
    import tasks

    assert flows.__file__ is not None and tasks.__file__ is not None
    root = __file__.partition("/tests/flows/")[0]
    assert flows.__file__ == f"{root}/flows/__init__.py"
    assert tasks.__file__ == f"{root}/tasks/__init__.py"
