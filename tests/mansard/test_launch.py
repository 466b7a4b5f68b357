"""Derivations: remembered by everything that decides them, safe to kill, waited for by a second caller."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mansard.errors import BadInput, StageFailed
from mansard.launch import Request, derive, derive_all, recipe_of, this_interpreter
from mansard.records import SnapshotId
from mansard.site import Site
from mansard.specs.surgery import Expand, Quantize
from mansard.store.collection import collect
from mansard.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 900.0
CALLER = """
import json, sys
from pathlib import Path
from mansard.launch import Request, derive, this_interpreter
from mansard.site import Site
from mansard.store.store import Store
root, home, stage, inputs, spec = sys.argv[1], Path(sys.argv[2]), sys.argv[3], *map(json.loads, sys.argv[4:])
site = Site(Path("-"), home, home, ("m",), {"main": this_interpreter(Path(root))}, {"default": "main"})
print(derive(Store(site.store), site, Request(stage, inputs, spec)).snapshot)
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    home = tmp_path / "home"
    home.mkdir()
    return Site(tmp_path / "site.yaml", home, home, ("m",), {"main": this_interpreter(ROOT)}, {"default": "main"})


def expansion(base: SnapshotId, blocks: int = 1) -> Request:
    return Request("expand", {"model": base}, Expand(blocks=blocks).model_dump(mode="json"))


def caller(site: Site, request: Request) -> "subprocess.Popen[str]":
    """Another process that derives the same."""
    words = [str(ROOT), str(site.home), request.stage, json.dumps(dict(request.inputs)), json.dumps(dict(request.spec))]
    return subprocess.Popen([sys.executable, "-c", CALLER, *words], stdout=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"never: {what}")


def workers_of(site: Site) -> list[int]:
    """Processes that work for this site: every worker has its request file on its command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"mansard.worker" in command and str(site.home).encode() in command:
                found.append(int(entry.name))
    return found


def test_a_second_derivation_is_remembered_and_starts_nothing(site: Site, make_checkpoint: Any) -> None:
    store = Store(site.store)
    base = store.snapshot(make_checkpoint())
    first = derive(store, site, expansion(base))
    again = derive(store, site, expansion(base))
    assert (first.reused, again.reused, again.snapshot) == (False, True, first.snapshot)
    assert store.lineage(first.snapshot)[0]["inputs"] == {"model": base}
    assert len(list((site.logs / "stages").glob("*.log"))) == 1


def test_derivations_of_one_stage_share_a_process_and_keep_their_order(site: Site, make_checkpoint: Any) -> None:
    store = Store(site.store)
    base = store.snapshot(make_checkpoint())
    second = derive(store, site, expansion(base, 2))
    made = derive_all(store, site, [expansion(base, n) for n in (1, 2, 3)])
    assert [d.reused for d in made] == [False, True, False]
    assert made[1].snapshot == second.snapshot
    assert len({d.snapshot for d in made}) == 3
    assert made[0].log == made[2].log


def test_everything_that_decides_is_in_the_recipe_and_nothing_else(tmp_path: Path) -> None:
    request = Request("quantize", {"model": "a", "data": "b"}, {"samples": 1})
    lock = ROOT / "infra/constraints/main.txt"
    other_lock = tmp_path / "lock.txt"
    text = lock.read_text()
    other_lock.write_text(text.replace("llmcompressor==", "llmcompressor==9"))
    unrelated = tmp_path / "unrelated.txt"
    unrelated.write_text(text.replace("prefect==", "prefect==9"))
    known = recipe_of(request, lock)
    assert known == recipe_of(replace(request, where={"endpoint": "x"}), unrelated)
    others = [
        recipe_of(replace(request, stage="prove"), lock),
        recipe_of(replace(request, inputs={"model": "a", "data": "c"}), lock),
        recipe_of(replace(request, spec={"samples": 2}), lock),
        recipe_of(request, other_lock),
    ]
    assert len({known, *others}) == 5


def test_a_lock_without_a_declared_package_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("numpy==1.0\n")
    with pytest.raises(BadInput, match=r"no version of .*llmcompressor"):
        recipe_of(Request("quantize", {}, {}), lock)


def test_what_a_stage_refuses_reaches_the_caller_as_its_own_error(site: Site, make_checkpoint: Any) -> None:
    store = Store(site.store)
    base = store.snapshot(make_checkpoint(depth=2))
    spec = Expand(blocks=1, positions=[7]).model_dump(mode="json")
    with pytest.raises(BadInput, match="7"):
        derive(store, site, Request("expand", {"model": base}, spec))


def test_a_collect_leaves_what_a_running_recipe_needs(site: Site, make_checkpoint: Any) -> None:
    """The worker waits for its recipe's lock meanwhile, so that it surely is at work when the collect runs."""
    store = Store(site.store)
    other = store.put_files({"x": b"x"})
    for path in store.root.rglob("*"):  # long before the worker's lease, whatever the clocks' slack
        os.utime(path, (1e9, 1e9))
    base = store.snapshot(make_checkpoint(depth=2))
    request = expansion(base)
    with store.lock(recipe_of(request, ROOT / "infra/constraints/main.txt")):
        running = caller(site, request)
        wait_for(store.leases.begun, "the worker's lease")
        assert collect(store, frozenset, grace_seconds=-1e6).snapshots == (other,)
    made = running.communicate(timeout=DEADLINE_SECONDS)[0].strip()
    assert running.returncode == 0
    assert store.holds(made)
    assert collect(store, frozenset, grace_seconds=-1e6).snapshots == tuple(sorted((base, made)))


def test_an_interpreter_with_other_versions_than_its_lock_is_refused(
    site: Site, tmp_path: Path, make_checkpoint: Any
) -> None:
    store = Store(site.store)
    base = store.snapshot(make_checkpoint())
    lock = tmp_path / "lock.txt"
    text = (ROOT / "infra/constraints/main.txt").read_text()
    lock.write_text(text.replace("torch==", "torch==9."))
    other = replace(site, environments={"main": replace(site.environments["main"], lock=lock)})
    with pytest.raises(StageFailed, match=r"torch .* is installed, the lock says 9\."):
        derive(store, other, Request("prove", {"base": base, "expansion": base}, {"probe_tokens": 4, "seed": 0}))


def test_a_stage_over_its_time_is_ended_with_its_group(site: Site, make_checkpoint: Any) -> None:
    store = Store(site.store)
    base = store.snapshot(make_checkpoint())
    with pytest.raises(StageFailed, match="ran over 0 s and was ended"):
        derive(store, replace(site, stage_timeout_seconds=0), expansion(base))
    assert workers_of(site) == []


def test_a_second_caller_waits_and_finds_the_result(site: Site, make_checkpoint: Any) -> None:
    store = Store(site.store)
    request = expansion(store.snapshot(make_checkpoint()))
    recipe = recipe_of(request, site.environments["main"].lock)
    with store.lock(recipe):
        callers = [caller(site, request) for _ in range(2)]
        wait_for(lambda: len(workers_of(site)) == 2, "both callers have a worker that waits for the recipe's lock")
        assert store.recall(recipe) is None
    answers = [c.communicate(timeout=DEADLINE_SECONDS)[0].strip() for c in callers]
    assert answers == [derive(store, site, request).snapshot] * 2
    assert len(store.lineage(answers[0])) == 1


@pytest.mark.slow
def test_quantization_killed_with_its_caller_leaves_nothing_and_ends_in_the_same_snapshot(
    site: Site, tmp_path: Path
) -> None:
    request = quantization(Store(site.store), tmp_path)
    killed = caller(site, request)
    log = site.logs / "stages"
    wait_for(lambda: any("calibrat" in p.read_text().lower() for p in log.glob("*.log")), "calibration has begun")
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=DEADLINE_SECONDS)
    wait_for(lambda: not workers_of(site), "the worker ended with its caller")
    made = derive(Store(site.store), site, request)
    elsewhere = replace(site, home=tmp_path / "elsewhere")
    elsewhere.home.mkdir()
    undisturbed = derive(Store(elsewhere.store), elsewhere, quantization(Store(elsewhere.store), tmp_path))
    assert (made.reused, made.snapshot) == (False, undisturbed.snapshot)


def quantization(store: Store, folder: Path) -> Request:
    """A request on a very small base, made once."""
    from mansard.demo.base import save_base, train_tokenizer, untrained_model

    base = folder / "base"
    texts = [f"line {i}: " + " ".join(str((i * 7 + j) % 23) for j in range(60)) for i in range(60)]
    shape = {"vocabulary": 300, "hidden": 128, "intermediate": 128, "blocks": 1, "heads": 2, "max_tokens": 64}
    if not base.exists():
        save_base(untrained_model(shape, 0), train_tokenizer(texts, shape["vocabulary"], 64), base)
    lines = "".join(json.dumps({"text": t, "file": f"{i}.py"}) + "\n" for i, t in enumerate(texts))
    inputs: Mapping[str, SnapshotId] = {
        "model": store.snapshot(base),
        "data": store.put_files({"data.jsonl": lines.encode()}),
    }
    spec = Quantize(source="s", samples=16, sample_tokens=32).model_dump(mode="json")
    return Request("quantize", inputs, spec)
