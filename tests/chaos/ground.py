"""A whole site on a tiny random model, made once: a base in service, one upgrade that nothing disturbed; and copies.

A copy has the store, the journal and the folder of its own that the site had before the upgrade; it shares the running
stack (servers, host and engines) with the site. What engines answered the undisturbed upgrade may be put into it, so
that a copy without those answers is the only one that asks an engine.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mansard.records import Registration
from mansard.release.journal import Journal
from mansard.site import Site, load_site
from mansard.store.store import Store
from tests.end_to_end.conftest import ROOT, write_site

ENGINE_STAGES = ("evaluate", "fingerprint", "cost")
NOT_TAKEN_OVER = ("snapshot", "judge")
"""Taking the base in is not a remembered derivation; the judgement is always made anew."""
NUM_FILES, ITEMS_A_FILE, ITEM_BYTES = 30, 2, 120
SPEC = "configs/upgrade/chaos.yaml"


@dataclass(frozen=True, slots=True)
class Copy:
    """A site as it was before the upgrade, and what runs on it."""

    site: Site
    folder: Path

    def command(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "flows.cli", *map(str, words), "--site", str(self.site.path), "--json"]

    def run(self, *words: object, statuses: Iterable[int] = (0,)) -> Any:
        """What the command said, as JSON."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, cwd=self.folder, check=False)
        if done.returncode not in statuses:
            raise RuntimeError(f"mansard {words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return json.loads(done.stdout) if done.stdout.strip() else None

    def registration(self, version: int) -> Registration:
        with Journal.open(self.site.journal) as journal:
            return journal.registration("demo", version)


@dataclass(frozen=True, slots=True)
class Ground:
    """The site that is up, how it was before the upgrade, and the undisturbed upgrade."""

    whole: Copy
    before: Path
    undisturbed: Registration

    def copy(self, name: str, is_answered: bool) -> Copy:
        """A site before the upgrade; `is_answered`: what engines said of the upgrade's artifact is known already."""
        folder = self.whole.folder
        tree = yaml.safe_load(self.whole.site.path.read_text())
        tree["home"] = str(folder / name)
        path = self.whole.site.path.with_name(f"{name}.yaml")
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        site = load_site(path)
        shutil.copytree(self.before, site.home, copy_function=os.link)
        site.journal.unlink()
        copy_database(self.before / "journal.sqlite3", site.journal)
        site.run.symlink_to(self.whole.site.run)
        for stage in self.undisturbed.stages:
            if (stage[0] in ENGINE_STAGES) == is_answered and stage[0] not in NOT_TAKEN_OVER:
                take_over(self.whole.site.store, site.store, *stage[1:])
        return Copy(site, folder)


def make_ground(folder: Path) -> Ground:
    """Everything up to the undisturbed upgrade: a few minutes, two engine starts."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    site = load_site(write_site(folder))
    whole = Copy(site, folder)
    os.environ["MANSARD_KEYS"] = str(site.home / "keys")
    for name in ("ada", "grace"):
        whole.run("keygen", name)
    write_texts(site.data)
    for name, seed in (("base", 0), ("taller", 1)):
        write_llama(site.data / name, seed)
    write_specs(folder)
    subprocess.run(whole.command("up")[:-1], cwd=folder, check=True)
    whole.run("adopt", "configs/adopt/chaos.yaml")
    whole.run("approve", 1, "--as", "grace", "--reason", "the base of the campaign")
    whole.run("release", 1, "--as", "ada")
    before = folder / "before"
    scratch = shutil.ignore_patterns("trees", "locks", "incoming", "work", "leases")
    shutil.copytree(site.store, before / "store", copy_function=os.link, ignore=scratch)
    copy_database(site.journal, before / "journal.sqlite3")
    version = whole.run("upgrade", SPEC, statuses=(0, 3))["version"]
    return Ground(whole, before, whole.registration(version))


def copy_database(source: Path, target: Path) -> None:
    """SQLite's own copy: the host has it open."""
    with sqlite3.connect(source) as one, sqlite3.connect(target) as other:
        one.backup(other)
    one.close()
    other.close()


def take_over(source: Path, target: Path, recipe: str, snapshot: str) -> None:
    """One remembered derivation, from store to store."""
    files = [f"manifests/{snapshot}", f"recipes/{recipe}.json", f"lineage/{snapshot}/{recipe}.json"]
    files += [f"objects/{d[:2]}/{d}" for _, _, d, _ in Store(source).manifest(snapshot).objects()]
    for name in files:
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(source / name, target / name)


def write_texts(data: Path) -> None:
    """Training text and suites from this Python's own library: one half for training, one for the suites."""
    sources = sorted(p for p in Path(os.__file__).parent.glob("*.py") if p.stat().st_size > 4000)[: 2 * NUM_FILES]
    train, asked = sources[:NUM_FILES], sources[NUM_FILES:]
    data.mkdir(parents=True, exist_ok=True)
    rows = [{"text": p.read_text(errors="replace")[:4000], "file": p.name} for p in train]
    for name, shift in (("code", 0), ("docs", NUM_FILES // 2)):
        for part, some in (("train", rows[shift : shift + 15]), ("held-out", rows[shift : shift + 3])):
            _write_lines(data / f"{name}.{part}.jsonl", some)
    for name, begin in (("code-bits", 500), ("docs-bits", 2000)):
        items = [
            {"id": f"{p.name}-{i}", "file": p.name, "text": p.read_text(errors="replace")[at : at + ITEM_BYTES]}
            for p in asked
            for i in range(ITEMS_A_FILE)
            for at in (begin + i * ITEM_BYTES,)
        ]
        _write_lines(data / f"{name}.jsonl", items)


def _write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_llama(folder: Path, seed: int) -> None:
    """A random Llama of two blocks that reads bytes, in a process of its own: this one stays free of torch."""
    code = "import sys, pathlib, tests.mansard.models.conftest as c; c._write_llama(*eval(sys.argv[1]))"
    shape = {"num_attention_heads": 2, "max_position_embeddings": 512}
    arguments = f"(pathlib.Path({str(folder)!r}), {seed}, 'bfloat16', {shape})"
    subprocess.run([sys.executable, "-c", code, arguments], cwd=ROOT, check=True)


def write_specs(folder: Path) -> None:
    """The demo's specs, made small."""
    for verb in ("adopt", "upgrade"):
        spec = yaml.safe_load((ROOT / f"configs/{verb}/demo.yaml").read_text())
        spec["base"] = {"path": "base" if verb == "adopt" else "taller"}
        spec["serve"]["max_model_len"] = 512
        spec["quantize"] |= {"source": "docs", "samples": 8, "sample_tokens": 64}
        spec["data"] |= {"sequence_tokens": 64, "min_domain_fraction": 0.0, "sources": _sources(verb)}
        spec["cost"] = {"prompts": 8, "concurrency": 2, "prompt_tokens": 32, "output_tokens": 16}
        roles = ("report", "report") if verb == "adopt" else ("target", "guard")
        spec["gate"]["suites"] = [
            {"suite": f"../suites/chaos-{name}.yaml", "role": role, "margin": 0.5 if role == "guard" else 0.0}
            for name, role in zip(("code", "docs"), roles, strict=True)
        ]
        if verb == "upgrade":
            spec["gate"]["max_shared_fraction"] = 1.0
            spec["expand"] = {"blocks": 1, "positions": "even"}
            spec["train"] |= {"tokens": 51_200, "checkpoint_every_steps": 20, "evaluate_every_steps": 100}
        (folder / f"configs/{verb}/chaos.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    for name in ("code", "docs"):
        suite = {"format": 1, "name": f"{name}-bits", "kind": "bits_per_byte", "items": f"{name}-bits.jsonl"}
        (folder / f"configs/suites/chaos-{name}.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))


def _sources(verb: str) -> list[dict[str, Any]]:
    names = ("docs",) if verb == "adopt" else ("code", "docs")
    return [
        {"name": n, "train": f"{n}.train.jsonl", "held_out": f"{n}.held-out.jsonl", "weight": 0.5,
         "is_domain": n == "code"}
        for n in names
    ]  # fmt: skip
