"""A whole site in a temporary folder: real Prefect, MLflow, host, router and vLLM, on free ports, ended afterwards."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mansard.launch import Request, derive
from mansard.site import Site, load_site
from mansard.store.store import Store
from tests.free_ports import free_ports
from tests.terminal import Shown, run_in_terminal

ROOT = Path(__file__).resolve().parents[2]
COMMAND_TIMEOUT_SECONDS = 3600
"""Generous: the machine of CI is slow and shared."""
LONG = ("up", "adopt", "upgrade", "customize", "gate", "remove-storey", "release")
"""Verbs that a person watches: they run in a terminal."""
CORPUS = {
    "format": 1,
    "seed": 0,
    "train_code_bytes": 1_500_000,
    "train_docstring_bytes": None,
    "items_per_suite": 200,
    "choice_items": 200,
    "python": platform.python_version(),
}
BASE: dict[str, Any] = {
    "format": 1,
    "model": {"vocabulary": 2048, "hidden": 128, "intermediate": 384, "blocks": 4, "heads": 2, "max_tokens": 1024},
    "sequence_tokens": 256,
    "train": {
        "tokens": 150_000,
        "batch_sequences": 2,
        "learning_rates": {"new_blocks": 0.0, "base": 2e-3},
        "precision": "fp32",
        "evaluate_every_steps": 1000,
    },
}


@dataclass(frozen=True, slots=True)
class Story:
    """The site of the test and the command `mansard` on it."""

    site: Site
    folder: Path

    def run(self, *words: object, status: int = 0) -> str:
        """Standard output of `mansard WORDS`; fails unless it exits with `status`."""
        return self.ran(*words, status=status).stdout

    def json(self, *words: object, status: int = 0) -> Any:
        """The answer of `mansard WORDS --json`; a long verb shows its progress on a terminal meanwhile."""
        if words[0] in LONG:
            return self.in_terminal(*words, "--json", status=status).json()
        return json.loads(self.run(*words, "--json", status=status))

    def in_terminal(self, *words: object, status: int = 0, columns: int = 80) -> Shown:
        """`mansard WORDS` where standard output and error are a terminal; fails unless it exits with `status`."""
        shown = run_in_terminal(
            self.command(*words), columns, folder=self.folder, timeout_seconds=COMMAND_TIMEOUT_SECONDS
        )
        assert shown.status == status, f"mansard {words}: exit {shown.status}\n{shown.output}"
        assert "Traceback" not in shown.output, shown.output
        assert "--json" in words or shown.overflowing() == [], shown.output
        return shown

    def ran(self, *words: object, status: int = 0) -> "subprocess.CompletedProcess[str]":
        if words[0] in LONG:
            shown = self.in_terminal(*words, status=status)
            return subprocess.CompletedProcess(self.command(*words), status, "\n".join(shown.lines()), "")
        done = subprocess.run(
            [*self.command(*words)],
            capture_output=True,
            text=True,
            cwd=self.folder,
            timeout=COMMAND_TIMEOUT_SECONDS,
        )
        assert done.returncode == status, f"mansard {words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def command(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "flows.cli", *map(str, words), "--site", str(self.site.path)]

    def stable(self) -> int | None:
        found: dict[str, int] | None = self.json("status")["models"]["demo"]["stable"]
        return None if found is None else found["version"]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """A site with two people, text, and a small base that was just trained on it; the stack is up."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "configs", folder / "configs")
    site = load_site(write_site(folder))
    made = Story(site, folder)
    for name in ("ada", "grace"):
        made.run("keygen", name)
    write_specs(folder)
    store = Store(site.store)
    corpus = derive(store, site, Request("corpus", {}, CORPUS)).snapshot
    base = derive(store, site, Request("pretrain", {"corpus": corpus}, BASE)).snapshot
    store.restore(corpus, site.data / "corpus")
    store.restore(base, site.data / "base")
    made.run("up")
    try:
        yield made
    finally:
        keep = os.environ.get("MANSARD_KEEP_LOGS")
        made.run("down")
        if keep:
            shutil.copytree(site.logs, Path(keep), dirs_exist_ok=True)


def write_site(folder: Path) -> Path:
    """The shipped site with free ports and a folder of its own."""
    path = folder / "configs/site/test.yaml"
    tree = yaml.safe_load((ROOT / "configs/site/local.yaml").read_text())
    prefect, mlflow, router, engines = free_ports(4)
    tree["ports"] = {"prefect": prefect, "mlflow": mlflow, "router": router, "engines_from": engines}
    tree["router"] = {"show_version": "always"}  # the story counts answers by version
    for environment in tree["environments"].values():
        for key in ("python", "lock"):
            environment[key] = str(Path(os.path.normpath(ROOT / "configs/site" / environment[key])))
    tree["environments"]["serve"]["variables"] = {"PYTHONPATH": str(ROOT / "infra/vllm-plugin")}  # beside this file
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def write_specs(folder: Path) -> None:
    """The demo's specs with less training, and one that wrecks the docstrings on purpose: placed by importance and
    averaged into a base that trained too."""
    adopt = yaml.safe_load((ROOT / "configs/adopt/demo.yaml").read_text())
    upgrade = yaml.safe_load((ROOT / "configs/upgrade/demo.yaml").read_text())
    for spec in (adopt, upgrade):
        spec["quantize"]["samples"] = 32
        spec["gate"]["suites"] = [s for s in spec["gate"]["suites"] if "next-line" not in s["suite"]]
        spec["cost"] = {"prompts": 4, "concurrency": 2, "prompt_tokens": 32, "output_tokens": 16}
    upgrade["train"] |= {"tokens": 60_000, "batch_sequences": 2, "checkpoint_every_steps": 10}
    upgrade["train"]["learning_rates"] = {"new_blocks": 4e-3, "base": 0.0}
    weigh(upgrade, code=0.4)
    upgrade["release"]["latency_tolerance"] = 50.0  # what a busy machine does to latency is not this test's subject
    upgrade["release"]["steps"] = [
        {"weight_percent": 50, "bake_seconds": 3, "min_requests": 10, "deadline_seconds": 600},
        {"weight_percent": 100, "bake_seconds": 3, "min_requests": 10, "deadline_seconds": 600},
    ]
    harmful = json.loads(json.dumps(upgrade))
    harmful["train"] |= {"tokens": 20_000, "learning_rates": {"new_blocks": 2e-3, "base": 1e-2}, "frozen": None,
                         "new_blocks": None}  # fmt: skip
    harmful["expand"] = {"blocks": 2, "positions": "importance", "probe": {"rows": 4, "tokens": 128, "seed": 0}}
    harmful["fuse"] = {"method": "average", "weight": 0.5}
    harmful["quantize"] = {"scheme": "none"}
    weigh(harmful, code=0.9)
    customize = yaml.safe_load((ROOT / "configs/customize/demo.yaml").read_text())
    customize["capture"] |= {"tokens": 60_000, "held_out_rows": 8}
    customize["train"] |= {"tokens": 60_000}
    customize |= {"cost": adopt["cost"], "release": upgrade["release"]}
    specs = {"adopt/test": adopt, "upgrade/test": upgrade, "upgrade/harmful": harmful, "customize/demo": customize}
    for name, spec in specs.items():
        (folder / f"configs/{name}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))


def weigh(spec: dict[str, Any], code: float) -> None:
    """The share of code in the training mixture; docstrings are the rest."""
    weights = {"code": code, "docstrings": 1 - code}
    for source in spec["data"]["sources"]:
        source["weight"] = weights[source["name"]]


