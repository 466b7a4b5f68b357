"""A bucket that accepts and never answers, at the verbs that have a stack: each ends with one line, nothing is lost.

The other verbs, without a stack: tests/mansard/release/test_hanging_bucket.py. Verbs run side by side on one stack.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from mansard.release.journal import Journal
from mansard.site import Site, load_site
from tests.flows.finished_site import finished_site
from tests.free_ports import free_port
from tests.mansard.hanging_server import hanging_server
from tests.mansard.s3_server import environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
URL = "s3://models/mansard"
MakeCheckpoint = Callable[..., Path]
DEADLINE_SECONDS = 180.0
"""Of a command on a busy machine; the first one starts the stack."""
LINE = '{"text": "some text", "file": "a.py"}\n'
ITEM = '{"id": "1", "file": "a.py", "text": "some text"}\n'
CHOICE = ITEM.replace('"text": "some text"', '"context": "x", "choices": ["a", "b", "c", "d"], "answer": 0')
VERBS = (
    *(("adopt", "configs/adopt/demo.yaml"), ("upgrade", "configs/upgrade/demo.yaml")),
    *(("customize", "configs/customize/demo.yaml"), ("remove-storey", "2", "1"), ("release", "2")),
)


class Stack:
    def __init__(self, site: Site, url: str) -> None:
        self.site = site
        self._variables = {**os.environ, **environment(url), "MANSARD_PERSON": "ada", "PYTHONPATH": str(ROOT)}

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "flows.cli", *words, "--site", str(self.site.path)],
            cwd=self.site.path.parents[2], env=self._variables, capture_output=True, text=True,
            timeout=DEADLINE_SECONDS,
        )  # fmt: skip


@pytest.fixture
def running(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> Iterator[Stack]:
    """A site with three versions and its stack, whose store is a bucket that hangs."""
    site = finished_site(tmp_path)
    tree = yaml.safe_load(site.path.read_text())
    ports = {name: free_port() for name in ("prefect", "mlflow", "router", "engines_from")}
    site.path.write_text(yaml.safe_dump({**tree, "ports": ports, "store": URL}))
    shutil.rmtree(site.store)  # a folder holds one store, and this one's content is in the bucket
    site = load_site(site.path)
    corpus = site.data / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for name in ("code", "docstrings"):
        for part in ("train", "held-out"):
            (corpus / f"{name}.{part}.jsonl").write_text(LINE)
        (corpus / f"{name}-bits.jsonl").write_text(ITEM)
        (corpus / f"{name}-next-line.jsonl").write_text(CHOICE)
    shutil.move(make_checkpoint(), site.data / "base")
    adopt = tmp_path / "configs/adopt/demo.yaml"
    spec = yaml.safe_load(adopt.read_text())
    adopt.write_text(yaml.safe_dump({**spec, "quantize": {"scheme": "none"}}))  # the base is narrower than a group
    with hanging_server() as url:
        stack = Stack(site, url)
        up = stack.run("up")
        try:
            assert up.returncode == 0, up.stderr
            yield stack
        finally:
            down = stack.run("down")
            assert (down.returncode, "Traceback" in down.stderr) == (0, False), down.stderr


def test_every_verb_on_a_stack_ends_with_one_line_and_loses_nothing(running: Stack) -> None:
    with Journal.open(running.site.journal) as journal:
        before = journal.entries()
    with ThreadPoolExecutor(len(VERBS)) as threads:
        for words, ran in zip(VERBS, threads.map(lambda words: running.run(*words), VERBS), strict=True):
            lines = ran.stderr.splitlines()
            assert (ran.returncode, "Traceback" in ran.stderr) == (1, False), (words, ran.stdout, ran.stderr)
            assert lines[-1].startswith(f"mansard {words[0]}: "), (words, ran.stderr)
            assert f"{URL}: no answer to a " in lines[-1], (words, ran.stderr)
    with Journal.open(running.site.journal) as journal:
        assert journal.entries() == before
        journal.verify()
    status = running.run("status")
    assert (status.returncode, "host: ready" in status.stdout) == (0, True), (status.stdout, status.stderr)
