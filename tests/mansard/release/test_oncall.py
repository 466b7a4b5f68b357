"""What the on-call sees and does with nothing but files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mansard.errors import BadInput, Conflict, Corrupt, MansardError
from mansard.records import Registration
from mansard.release import oncall, oncall_text
from mansard.release.approval import approve, sign_registration
from mansard.release.direct_rollback import Request, rollback_directly
from mansard.release.events import Pointers
from mansard.release.journal import Journal
from mansard.release.roots import version_roots
from mansard.serving import split as splits
from mansard.site import Site
from mansard.site_sections import Person
from mansard.store.collection import collect
from mansard.store.store import Store

Make = Callable[..., Registration]
ROOT = Path(__file__).resolve().parents[3]


class Files:
    """The two things that serving gives to a rollback without the host, on a real split file."""

    def __init__(self, site: Site) -> None:
        self.path = site.split_file
        self.dead: set[int] = set()

    def answers(self, model: str, version: int) -> bool:
        found = splits.read_split(self.path).models.get(model)
        return found is not None and version in found.versions and version not in self.dead

    def write(self, model: str, pointers: Pointers, term: int) -> None:
        split = splits.read_split(self.path)
        known = split.models.get(model)
        if pointers.stable is None or (known is not None and (known.stable, known.canary) == (pointers.stable, None)):
            return
        endpoint = None if known is None else known.versions[pointers.stable].endpoint
        splits.write_split(self.path, splits.with_stable(split, model, pointers.stable, endpoint, model, term))


def release(journal: Journal, version: int) -> None:
    journal.start_rollout("demo", version, "otto", "", journal.pointers("demo"))
    journal.step("demo", version, 25, "host", "", journal.pointers("demo"))
    journal.promote("demo", version, "host", "all steps pass", journal.pointers("demo"))


def roll_back(site: Site, files: Files, **asked: object) -> dict[str, object]:
    arguments = {"from_version": None, "to_version": None, "hard": False, "who": "otto", "why": "", **asked}
    request = Request("demo", **arguments)  # type: ignore[arg-type]
    return rollback_directly(site, request, files.answers, files.write, lambda *_: [])


def pointers_and_split(site: Site) -> tuple[Pointers, int, int | None, int]:
    split = splits.read_split(site.split_file)
    with Journal.open(site.journal) as journal:
        journal.verify()
        pointers = journal.pointers("demo")
    return pointers, split.models["demo"].stable, split.models["demo"].canary, split.term


def test_rollback_with_the_host_down_moves_journal_and_split(three: Site) -> None:
    done = roll_back(three, Files(three), why="bad answers")
    assert (done["changed"], done["stable"], done["previous"], done["term"]) == (True, 2, 1, 10)
    assert done["message"] == "demo: version 2 is stable again, was 3"
    assert isinstance(done["milliseconds"], float)
    assert pointers_and_split(three) == (Pointers(2, None, 1, 10), 2, None, 10)
    last = oncall.history(three, "demo")[-1]
    assert (last["kind"], last["who"], last["why"]) == ("rolled_back", "otto", "bad answers")
    assert last["body"]["facts"] == {"host": "down", "hard": False}


def test_a_second_operator_changes_nothing(three: Site) -> None:
    files = Files(three)
    roll_back(three, files, from_version=3)
    again = roll_back(three, files, who="grace", from_version=3)
    assert (again["changed"], again["stable"]) == (False, 2)
    plain = roll_back(three, files, who="grace")
    assert (plain["changed"], plain["stable"]) == (False, 2)
    assert "otto rolled back from 3 to 2" in str(plain["message"])
    assert roll_back(three, files, from_version=2)["stable"] == 1
    with pytest.raises(Conflict, match="nothing to go back to"):
        roll_back(three, files, from_version=1)


def test_operators_who_roll_back_at_once_move_one_version(three: Site) -> None:
    code = """
import sys
from pathlib import Path
from mansard.release.direct_rollback import Request, rollback_directly
from mansard.site import load_site
site = load_site(Path(sys.argv[1]))
sys.stdin.readline()
who, alive, write = sys.argv[2], lambda model, version: True, lambda model, pointers, term: None
told = rollback_directly(site, Request("demo", None, None, False, who, ""), alive, write, lambda *_: [])
print(told["changed"], told["stable"])
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(three.path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for name in ("ada", "grace", "otto")
    ]
    for process in processes:
        assert process.stdin is not None
        print("go", file=process.stdin, flush=True)
    told = sorted(p.communicate(timeout=300)[0].split() for p in processes)
    assert told == [["False", "2"], ["False", "2"], ["True", "2"]]


def test_rollback_aborts_a_running_rollout_and_leaves_stable(three: Site, candidate: Make) -> None:
    with Journal.open(three.journal) as journal:
        journal.register(candidate("four"), None)
        journal.start_rollout("demo", 4, "otto", "", journal.pointers("demo"))
        term = journal.step("demo", 4, 25, "host", "", journal.pointers("demo"))
    split = splits.read_split(three.split_file)
    split = splits.with_canary(split, "demo", 4, "http://127.0.0.1:8104", "demo", 25, term)
    splits.write_split(three.split_file, split)
    done = roll_back(three, Files(three))
    assert (done["changed"], done["action"], done["stable"], done["canary"]) == (True, "abort", 3, None)
    assert pointers_and_split(three) == (Pointers(3, None, 2, 12), 3, None, 12)


def test_a_rollback_killed_before_the_split_was_written_is_finished_by_the_next(three: Site) -> None:
    with Journal.open(three.journal) as journal:
        journal.rollback("demo", 2, "otto", "", journal.pointers("demo"))
    assert oncall.status(three, "demo")["split"]["agrees"] is False
    done = roll_back(three, Files(three))
    assert (done["changed"], done["stable"]) == (False, 2)
    assert pointers_and_split(three) == (Pointers(2, None, 1, 10), 2, None, 10)
    assert oncall.status(three, "demo")["split"]["agrees"] is True


def test_a_target_without_an_engine_moves_only_with_hard(three: Site) -> None:
    files = Files(three)
    files.dead = {2}
    with pytest.raises(MansardError, match=r"version 2 has no engine that answers.*--hard") as caught:
        roll_back(three, files)
    assert caught.value.exit_code == 1
    assert pointers_and_split(three)[:2] == (Pointers(3, None, 2, 9), 3)
    done = roll_back(three, files, hard=True)
    assert done["stable"] == 2
    assert done["warnings"] == ["version 2 has no engine that answers; the router answers 503 until mansard up"]
    assert pointers_and_split(three)[1] == 2


def test_a_damaged_target_moves_only_with_hard(three: Site) -> None:
    with Journal.open(three.journal) as journal:
        artifact = journal.registration("demo", 2).artifact
    manifest = three.store / "manifests" / artifact
    manifest.chmod(0o644)
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(Corrupt, match=r"demo version 2: .*--hard") as caught:
        roll_back(three, Files(three))
    assert caught.value.exit_code == 6
    assert roll_back(three, Files(three), to_version=1)["stable"] == 1


def test_a_damaged_target_is_a_warning_with_hard(three: Site) -> None:
    with Journal.open(three.journal) as journal:
        (three.store / "manifests" / journal.registration("demo", 2).artifact).unlink()
    done = roll_back(three, Files(three), hard=True)
    assert done["stable"] == 2
    assert "is not whole" in str(done["warnings"])


def test_signers_who_left_are_reported_and_do_not_stop(three: Site, with_people: Callable[..., Site]) -> None:
    changed = with_people(grace=None, ada=Person(("operator",), three.public_key("ada").hex()))
    done = roll_back(changed, Files(three))
    assert done["stable"] == 2
    assert done["warnings"] == [
        "version 2: ada, its author, has that role in site.yaml no more",
        "version 2: grace, its reviewer, has that role in site.yaml no more",
    ]


def test_a_target_that_was_never_stable_is_bad_input(three: Site, candidate: Make) -> None:
    with Journal.open(three.journal) as journal:
        journal.register(candidate("four"), None)
    for version in (4, 9):
        with pytest.raises(BadInput, match=f"version {version} was never stable"):
            roll_back(three, Files(three), to_version=version)


def test_status_tells_where_everything_stands(three: Site, candidate: Make) -> None:
    (three.run).mkdir()
    (three.run / "mirror.json").write_text(
        json.dumps({"format": 1, "sequence": 2, "behind": 0, "at": "2025-01-01T00:00:00Z", "trouble": "no answer"})
    )
    with Journal.open(three.journal) as journal:
        journal.register(candidate("four", baseline_version=3), None)
        journal.register(candidate("five", baseline_version=3, verdict="fail"), None)
        tip = journal.tip()
    told = oncall.status(three, "demo")
    assert json.loads(json.dumps(told)) == told
    assert (told["stable"]["version"], told["previous"]["version"], told["canary"]) == (3, 2, None)
    assert told["stable"]["since"]["kind"] == "promoted"
    assert (told["term"], told["split"]["term"], told["split"]["agrees"]) == (9, 9, True)
    assert tip is not None
    assert told["mirror"]["lag"] == tip.sequence - 2
    assert [(v["version"], v["verdict"], v["is"]) for v in told["versions"]] == [
        (1, "baseline", []),
        (2, "pass", ["previous"]),
        (3, "pass", ["stable"]),
        (4, "pass", []),
        (5, "fail", []),
    ]
    assert told["next"] == "mansard review 4"
    text = oncall_text.status_text(told)
    assert "stable    3        " in text
    assert "version 3 100 % (http://127.0.0.1:8103)" in text
    assert "MLflow is" in text and "no answer" in text
    assert "next: mansard review 4" in text


def test_status_of_a_running_rollout_shows_its_weight(three: Site, candidate: Make) -> None:
    with Journal.open(three.journal) as journal:
        journal.register(candidate("four"), None)
        journal.start_rollout("demo", 4, "otto", "", journal.pointers("demo"))
        assert oncall.status(three, "demo")["canary"]["weight_percent"] == 0
        journal.step("demo", 4, 25, "host", "", journal.pointers("demo"))
    told = oncall.status(three, "demo")
    assert (told["canary"]["version"], told["canary"]["weight_percent"]) == (4, 25)
    assert "mansard rollback" in told["next"]
    assert "canary    4 at 25 %" in oncall_text.status_text(told)


def test_status_of_an_empty_site_makes_nothing(site: Site) -> None:
    told = oncall.status(site, "demo")
    assert (told["stable"], told["versions"], told["next"]) == (None, [], "mansard adopt SPEC")
    assert "nothing is registered yet" in oncall_text.status_text(told)
    assert oncall.history(site, "demo") == []
    assert "mansard adopt" in oncall_text.history_text([])
    assert not site.journal.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"models": []}', '{"term": 1, "models": {"demo": 3}}', "\x00\xff"])
def test_a_damaged_split_or_mirror_file_is_told_not_raised(three: Site, content: str) -> None:
    three.run.mkdir()
    for path in (three.split_file, three.run / "mirror.json"):
        path.write_bytes(content.encode("latin-1"))
    told = oncall.status(three, "demo")
    assert told["split"]["agrees"] is False
    assert "damaged" in oncall_text.status_text(told)


def test_history_shows_every_entry_of_the_model(three: Site) -> None:
    with Journal.open(three.journal) as journal:
        journal.append("other", "approved", "grace", "of another model", {})
    told = oncall.history(three, "demo")
    assert json.loads(json.dumps(told)) == told
    assert [e["kind"] for e in told[:6]] == [
        *("registered", "people_changed", "approved", "rollout_started", "canary_step", "promoted")
    ]
    assert {e["model"] for e in told} == {"demo", ""}
    lines = oncall_text.history_text(told).splitlines()
    assert len(lines) == len(told) + 1
    assert "canary version 1 at 25 %" in lines[5]


@pytest.fixture
def derived(site: Site, store: Store, candidate: Make) -> Site:
    """Version 2 was built on version 1 by stages that the store remembers, from data that nothing made."""

    def made(stage: str, inputs: dict[str, str], name: str = "of", data: bytes = b"") -> tuple[str, str, str]:
        snapshot = store.put_files({name: data or stage.encode()})
        recipe = f"{len(stage):02x}{stage.encode().hex()}".ljust(64, "0")
        store.remember(recipe, snapshot, {"stage": stage, "recipe": recipe, "inputs": inputs, "begun_at": "2025"})
        return stage, recipe, snapshot

    base, code, items = (store.put_files({"data.jsonl": name.encode()}) for name in ("base", "code", "items"))
    quantize = made("quantize", {"model": base, "data": code})
    records = made("evaluate", {"artifact": quantize[2], "suite": items})
    verdict = store.put_files({"verdict.json": b"{}"})
    first = candidate("one", verdict="baseline", base_version=None, baseline_version=None, anchor_version=None)
    first = replace(first, model=base, artifact=quantize[2], verdict_record=verdict, stages=(quantize, records))
    first = replace(first, item_records=(("bits", records[2]),))
    expand = made("expand", {"model": base})
    train = made("train", {"expansion": expand[2], "data.code.train": code})
    fuse = made("fuse", {"expansion": expand[2], "trained": train[2]})
    artifact = made("quantize2", {"model": fuse[2], "data": code})
    again = made("evaluate2", {"artifact": artifact[2], "suite": items})
    against = {"before": {"value": 2.0}, "effect": {"value": 0.1, "low": 0.05, "high": 0.15}}
    suite = {"suite": "bits", "role": "guard", "num_items": 3, "baseline": against, "verdict": "pass"}
    told = json.dumps({"suites": [suite]}).encode()
    judge = made("judge", {"candidate.bits": again[2], "baseline.bits": records[2]}, "verdict.json", told)
    second = candidate("two", model=fuse[2], artifact=artifact[2], verdict_record=judge[2])
    stages = (expand, train, fuse, artifact, records, again, judge)
    second = replace(second, stages=stages, item_records=(("bits", again[2]),))
    with Journal.open(site.journal) as journal:
        for version, registration in ((1, first), (2, second)):
            journal.register(registration, sign_registration(site, registration))
            approve(site, journal, store, "demo", version, "grace", "good evidence")
            release(journal, version)
    return site


def test_why_walks_from_the_pointer_to_the_first_base(derived: Site, store: Store) -> None:
    told = oncall.why(derived, "demo", 2)
    assert json.loads(json.dumps(told)) == told
    assert (told["is"], told["pointer"]["kind"], told["problems"]) == (["stable"], "promoted", [])
    assert [link["version"] for link in told["chain"]] == [2, 1]
    two, one = told["chain"]
    assert (two["decision"]["who"], two["decision"]["reason"]) == ("grace", "good evidence")
    assert two["decision"]["verdict_record"] == two["verdict_record"]
    assert two["suites"][0]["interval"] == [0.05, 0.15]
    stages = [s["stage"] for s in two["stages"]]
    assert stages == ["expand", "train", "fuse", "quantize2", "evaluate", "evaluate2", "judge"]
    assert all(s["is_held"] and s["recipe"] for s in two["stages"])
    outside = {d["name"]: (d["is"], d["snapshot"]) for d in two["data"]}
    assert outside["expand: model"] == ("version 1's model", one["model"])
    assert outside["evaluate: artifact"] == ("version 1's artifact", one["artifact"])
    code = {d["snapshot"] for d in two["data"] if d["is"] == "data"} & {d["snapshot"] for d in one["data"]}
    assert len(code) == 2  # the training text and the suite
    assert told["base"] == one["model"]
    assert store.read_file(told["base"], "data.jsonl") == b"base"
    text = oncall_text.why_text(told)
    assert f"base of version 1: {told['base']}" in text
    assert "approved by grace" in text and "bits (guard): pass, n 3, change +0.1000" in text


def test_why_names_the_base_of_an_upgrade_that_began_in_a_folder(site: Site, store: Store, candidate: Make) -> None:
    base, fused = store.put_files({"base.bin": b"base"}), store.put_files({"fused.bin": b"fused"})
    store.remember("f" * 64, fused, {"stage": "fuse", "recipe": "f" * 64, "inputs": {"model": base}})
    stages = (("snapshot", "a" * 64, base), ("fuse", "f" * 64, fused))
    made = candidate(model=fused, base_version=None, baseline_version=None, anchor_version=None, stages=stages)
    with Journal.open(site.journal) as journal:
        journal.register(made, sign_registration(site, made))
    told = oncall.why(site, "demo", 1)
    assert (told["base"], told["chain"][0]["model"], told["problems"]) == (base, fused, [])
    assert told["chain"][0]["data"] == [{"name": "fuse: model", "snapshot": base, "is": "base"}]
    assert f"base of version 1: {base}" in oncall_text.why_text(told)


def test_a_collect_leaves_all_that_why_tells_of(derived: Site, store: Store) -> None:
    unused = store.put_files({"x": b"no version came of it"})
    before = oncall.why(derived, "demo", 2)
    with Journal.open(derived.journal) as journal:
        done = collect(store, lambda: version_roots(journal, store), grace_seconds=-1e6)
    assert unused in done.snapshots
    assert oncall.why(derived, "demo", 2) == before
    assert before["problems"] == []
    assert store.verify() == []


def test_why_tells_what_is_damaged_or_gone(derived: Site, store: Store) -> None:
    with Journal.open(derived.journal) as journal:
        registration = journal.registration("demo", 2)
    for record in (store.root / "lineage" / registration.artifact).glob("*.json"):
        record.write_text("{")
    (store.root / "manifests" / registration.verdict_record).unlink()
    told = oncall.why(derived, "demo", 2)
    assert [link["version"] for link in told["chain"]] == [2, 1]
    assert any("verdict record" in p for p in told["problems"])
    assert any("stage quantize2: no lineage record" in p for p in told["problems"])
    assert "problem: " in oncall_text.why_text(told)
    with pytest.raises(BadInput, match="demo has no version 9"):
        oncall.why(derived, "demo", 9)


def test_on_call_modules_load_nothing_heavy() -> None:
    """Bare Python, PyYAML and the standard library; BLAKE3 comes only with evidence."""
    code = """
import sys
before = set(sys.modules)
import mansard.release.oncall, mansard.release.oncall_text
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
known = {"mansard", "yaml", "_yaml", "cython_runtime"}  # PyYAML is compiled with Cython
third = sorted(n for n in loaded - set(sys.stdlib_module_names) - known if not n.startswith("_cython"))
print(third, "asyncio" in loaded)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[] False"
