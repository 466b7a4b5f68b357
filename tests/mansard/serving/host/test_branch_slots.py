"""Branches of one base as versions: they share an engine, move without a start, and each answers as evaluation saw it.

The host and the router are real; the engine is the stand-in, and in one test the real vLLM with our plugin.
"""

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
import yaml

from mansard.canonical import canonical_json
from mansard.carry_on.branch import Branch
from mansard.carry_on.branch_file import branch_bytes
from mansard.carry_on.model import load_carry_on
from mansard.composition.compose import compose
from mansard.composition.description import FILE, BranchDescription
from mansard.composition.shape import shape_of
from mansard.demo.base import save_base, train_tokenizer, untrained_model
from mansard.errors import BadInput
from mansard.evaluation.engine_api import post_json
from mansard.evaluation.fingerprint import take
from mansard.release.journal import Journal
from mansard.serving.host.place import branch_folder
from mansard.serving.split import VersionSplit
from mansard.site import load_site
from tests.mansard.serving.conftest import ask, engine_statuses

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[4]
RELEASE: dict[str, Any] = {
    "steps": [{"weight_percent": w, "bake_seconds": 0.2, "min_requests": 10} for w in (50, 100)],
    "max_error_excess": 0.02, "latency_tolerance": 50.0, "output_tolerance": 2.0,
}  # fmt: skip
SHAPE = {"vocabulary": 512, "hidden": 128, "intermediate": 256, "blocks": 2, "heads": 2, "max_tokens": 1024}


def set_site(place: Any, **engine: Any) -> None:
    """More keys for the site's `engine`."""
    tree = json.loads(place.site.path.read_text())
    tree["engine"] |= engine
    place.site.path.write_text(json.dumps(tree))
    place.site = load_site(place.site.path)


@pytest.fixture
def base(place: Any) -> str:
    """The artifact of a small Llama on which branches can stand, and a site with four slots."""
    set_site(place, branch_slots=4)
    tree = place.home / "base"
    model = untrained_model(SHAPE, 0)
    with torch.no_grad():
        for parameter in model.parameters():  # far enough from zero that greedy answers are no ties
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    save_base(model, train_tokenizer([f"word{i} " * 30 for i in range(50)], 512, 1024), tree)
    (tree / "behaviour.json").write_bytes(canonical_json({"voice": "base"}))
    return str(place.store.snapshot(tree))


def branch_on(place: Any, base: str, seed: int, taps: tuple[int, ...] = ()) -> str:
    """The artifact of a random branch on `base`."""
    shape = shape_of(128, 64, 1, taps)
    branch = Branch(shape)
    branch.start(seed)
    with torch.no_grad():
        branch.output.copy_(torch.randn(branch.output.shape, generator=torch.Generator().manual_seed(seed)))
    data = branch_bytes(BranchDescription(base, shape, 1.0), dict(branch.named_parameters()), torch.float32)
    folder = place.home / f"branch-{seed}"
    folder.mkdir()
    (folder / FILE).write_bytes(data)
    return compose(place.store, base, place.store.snapshot(folder), 1.0)


@pytest.fixture
def three(place: Any, base: str) -> Iterator[list[int]]:
    """The base and two branches, registered; 1 is released."""
    place.start_host()
    place.start_router()
    versions = [place.register(artifact=base)]
    assert place.release(1)["state"] == "promoted"
    versions += [place.register(artifact=branch_on(place, base, seed)) for seed in (1, 2)]
    for version in versions[1:]:  # evaluation's own engines are not what serves
        place.client.call("POST", "/engines/stop", {"artifact": artifact_of(place, version)})
    yield versions


def artifact_of(place: Any, version: int) -> str:
    with Journal.open(place.site.journal) as journal:
        return str(journal.registration("demo", version).artifact)


def shared_engine(place: Any) -> dict[str, Any]:
    (found,) = [e for e in place.status()["engines"] if e["served_name"].startswith("base-")]
    return dict(found)


def served(place: Any, version: int) -> VersionSplit:
    found: VersionSplit = place.split().versions[version]
    return found


def release(place: Any, traffic: Any, version: int) -> None:
    """Judge, approve and release under traffic; a real engine takes minutes to start on a busy machine."""
    place.judged_against_stable(version)
    place.approve(version)
    if version > 1:  # a first version needs nobody, and nothing answers before it
        place.ask_as_users()
    place.start_rollout(version)
    over = ("promoted", "aborted")
    place.wait_for("the canary", lambda: place.rollout()["state"] in (*over, "canary"), 1800)
    traffic.start()
    ended = place.wait_for("the rollout's end", lambda: (r := place.rollout())["state"] in over and r, 1800)
    traffic.stop()
    assert ended["state"] == "promoted", ended["reason"]


def test_moving_between_branches_of_one_base_starts_no_engine(place: Any, three: list[int], traffic: Any) -> None:
    release(place, traffic, 2)
    before = shared_engine(place)
    assert before["branches"] == [artifact_of(place, 2)[:16]]
    release(place, traffic, 3)
    after = shared_engine(place)
    assert (after["pid"], len(after["branches"])) == (before["pid"], 2)
    assert served(place, 2).endpoint == served(place, 3).endpoint
    moved = place.roll_back()
    assert (moved["stable"], moved["started_seconds"], moved["warnings"]) == (2, 0.0, [])
    assert shared_engine(place)["pid"] == before["pid"]
    assert place.ask() == (200, "2")
    assert set(traffic.statuses) == {200}


def test_each_branch_answers_through_the_router_as_its_own_engine_did(
    place: Any, three: list[int], traffic: Any
) -> None:
    said = {1: ask(place.site.ports.router)[2]}
    for version in (2, 3):
        release(place, traffic, version)
        said[version] = ask(place.site.ports.router)[2]
    texts = {version: json.loads(body)["choices"][0]["text"] for version, body in said.items()}
    assert len(set(texts.values())) == 3
    assert texts[1].startswith(" base") and texts[2].startswith(" branch")


def test_a_shared_engine_that_dies_comes_back_with_its_branch(place: Any, three: list[int], traffic: Any) -> None:
    release(place, traffic, 2)
    before = shared_engine(place)
    os.kill(before["pid"], signal.SIGKILL)
    place.wait_for("another engine with the branch", lambda: _is_back(place, before["pid"]))
    place.wait_for("version 2 to answer again", lambda: place.ask() == (200, "2"))


def test_branches_that_die_together_do_not_stand_in_for_each_other(
    place: Any, three: list[int], traffic: Any
) -> None:
    release(place, traffic, 2)
    release(place, traffic, 3)
    os.kill(shared_engine(place)["pid"], signal.SIGKILL)

    def entries() -> list[tuple[str, Any]]:
        with Journal.open(place.site.journal) as journal:
            outages = journal.entries("demo", kinds=("stable_down", "stable_up"))
        return [(entry.kind, entry.body.get("to")) for entry in outages]

    place.wait_for("both entries", lambda: entries() == [("stable_down", 1), ("stable_up", None)])
    place.wait_for("version 3 to answer again", lambda: place.ask() == (200, "3"))


def _is_back(place: Any, pid: int) -> bool:
    engines = [e for e in place.status()["engines"] if e["served_name"].startswith("base-")]
    return any(e["pid"] != pid and e["state"] == "ready" and e["branches"] for e in engines)


def test_the_next_host_adopts_the_engine_with_its_branches(place: Any, three: list[int], traffic: Any) -> None:
    release(place, traffic, 2)
    before = shared_engine(place)
    place.host.kill()
    place.host.wait()
    place.start_host()
    place.wait_for("the branches of the adopted engine", lambda: shared_engine(place)["branches"])
    assert shared_engine(place)["pid"] == before["pid"]
    assert place.ask() == (200, "2")


def test_an_aborted_branch_leaves_the_engine_to_the_others(place: Any, three: list[int], traffic: Any) -> None:
    release(place, traffic, 2)
    other = place.store.put_files({"fingerprint.json": b'{"format":1,"answers":[]}'})
    place.register(artifact=branch_on(place, artifact_of(place, 1), 3), fingerprint=other)
    place.approve(4)
    place.start_rollout(4)
    ended = place.wait_for_end()
    assert ended["state"] == "aborted", ended
    place.wait_for("the branch to leave", lambda: len(shared_engine(place)["branches"]) == 1)
    assert place.ask() == (200, "2")


def load_branch(place: Any, endpoint: str, name: str, artifact: str) -> None:
    """Into a slot of a running engine, beside what the host does."""
    body = json.dumps({"lora_name": name, "lora_path": str(branch_folder(place.site, place.store, artifact))})
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{endpoint}/v1/load_lora_adapter", body.encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        answer.read()


def fingerprint_in_slot(place: Any, endpoint: str, artifact: str) -> str:
    """What a branch answers in a slot of a running engine; a third engine of its own would cost minutes."""
    load_branch(place, endpoint, "probe", artifact)
    taken = take(endpoint, "probe", ["def add(a, b):", "import os"], 4)
    return str(place.store.put_files({"fingerprint.json": canonical_json(taken.as_json())}))


def check_against_the_class(place: Any, endpoint: str, base: str, artifacts: dict[str | None, str]) -> None:
    """Greedy tokens of all at once, in float32, are the Hugging Face class's; `artifacts` are by served name, and
    under None one whose branch is left out: the base."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (5, 40, 90)]
    wanted, asked = [], []
    for name, artifact in artifacts.items():
        file = branch_folder(place.site, place.store, artifact) / FILE
        model = load_carry_on(place.home / "base", base, file, 0.0 if name is None else 1.0, torch.float32)
        for prompt in prompts:
            given = model.generate(
                torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            wanted.append(given[0, len(prompt) :].tolist())
            asked.append((name or f"base-{base[:16]}", prompt))

    def answer(one: tuple[str, list[int]]) -> list[int]:
        body = {"model": one[0], "prompt": one[1], "max_tokens": 16, "temperature": 0.0, "ignore_eos": True}
        choice = post_json(endpoint, "/v1/completions", {**body, "return_token_ids": True})["choices"][0]
        return list(choice["token_ids"])

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(answer, asked))
    assert found == wanted
    assert len({tuple(tokens) for tokens in found}) == len(found), "each says something else"


def check_nobody_else_is_answered(endpoint: str) -> None:
    """vLLM with our middleware: every path, the mounted /metrics too, for another user and for a page."""
    port = urlsplit(endpoint).port
    assert port is not None
    assert 200 in engine_statuses(port, os.getuid())
    assert engine_statuses(port, os.getuid(), origin="http://evil.example") == {401}
    if os.getuid() == 0:
        assert engine_statuses(port, 65534) == {401}


@pytest.mark.engine
def test_real_engine_answers_for_each_branch_as_evaluation_recorded_it(place: Any, base: str, traffic: Any) -> None:
    """vLLM with our plugin, branches that tap a layer: the fingerprints of engines of their own hold in the slots of a
    shared one; two of them and the base at once answer as the Hugging Face class; one without taps is refused."""
    tree = json.loads(place.site.path.read_text())
    tree["environments"]["serve"] = {
        "python": str(ROOT / ".venv-serve/bin/python"), "lock": str(ROOT / "infra/constraints/serve-cpu.txt"),
        "variables": {"VLLM_PLUGINS": "mansard_carry_on,mansard_cpu", "PYTHONPATH": str(ROOT / "infra/vllm-plugin")},
    }  # fmt: skip
    place.site.path.write_text(json.dumps(tree))
    set_site(place, start_timeout_seconds=1800)
    place.serve = {"dtype": "float32"}
    place.start_host()
    place.start_router()
    patient = {**RELEASE, "steps": [{**step, "deadline_seconds": 1500} for step in RELEASE["steps"]]}
    place.register(patient, artifact=base)
    release(place, traffic, 1)
    place.register(patient, artifact=branch_on(place, base, 1, (1,)))
    place.client.call("POST", "/engines/stop", {"artifact": artifact_of(place, 2)})
    release(place, traffic, 2)
    shared, other = shared_engine(place), branch_on(place, base, 2, (1,))
    place.register(patient, artifact=other, fingerprint=fingerprint_in_slot(place, shared["endpoint"], other))
    own = artifact_of(place, 2)
    check_against_the_class(place, shared["endpoint"], base, {own[:16]: own, "probe": other, None: own})
    with pytest.raises(urllib.error.HTTPError) as refused:
        load_branch(place, shared["endpoint"], "plain", branch_on(place, base, 3))
    said = json.loads(refused.value.read())["error"]["message"]
    assert (refused.value.code, "\n" in said) == (400, False)
    line = "a branch of taps none where the server's slots have taps [1]; slots hold one shape, start an engine for it"
    assert said.endswith(line)
    release(place, traffic, 3)
    assert shared_engine(place)["pid"] == shared["pid"]
    check_nobody_else_is_answered(shared["endpoint"])
    moved = place.roll_back()
    assert (moved["stable"], moved["started_seconds"], moved["warnings"]) == (2, 0.0, [])
    assert set(traffic.statuses) == {200}


def test_slots_are_refused_where_the_router_cannot_name_a_branch(place: Any) -> None:
    tree = json.loads(place.site.path.read_text())
    tree["engine"]["branch_slots"], tree["router"] = 4, {"plane": "haproxy"}
    (path := place.home / "other.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(BadInput, match=r"engine\.branch_slots: haproxy cannot tell an engine which branch is asked"):
        load_site(path)
