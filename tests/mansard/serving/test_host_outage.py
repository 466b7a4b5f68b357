"""The host runs on while the journal's database is down; people roll back all the same, and the journal hears of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mansard.release.journal import Journal
from mansard.site import load_site

ROOT = Path(__file__).resolve().parents[3]


def command(place: Any, *words: str) -> "subprocess.CompletedProcess[str]":
    whole = [sys.executable, "-m", "flows.cli", *words, "--site", str(place.site.path)]
    return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MANSARD_PERSON": "otto"})


def test_a_rollback_with_host_and_engines_up_and_the_database_down(place: Any, postgres: Any) -> None:
    tree = json.loads(place.site.path.read_text())
    place.site.path.write_text(json.dumps({**tree, "journal": postgres.new_journal()}))
    place.site = load_site(place.site.path)
    place.start_host()
    with Journal.open(place.site.journal) as journal:
        for voice in ("a", "b"):
            version = place.register(voice=voice)
            journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
            journal.promote("demo", version, "host", "", journal.pointers("demo"))
        entries = len(journal.entries())

    def is_in_service() -> bool:
        split = json.loads(place.site.split_file.read_bytes())["models"].get("demo", {})
        endpoints = [v["endpoint"] for v in split.get("versions", {}).values()]
        return split.get("stable") == 2 and len(endpoints) == 2 and None not in endpoints

    place.wait_for("both engines in the split", lambda: place.site.split_file.exists() and is_in_service())
    place.wait_for("the memory", lambda: json.loads(place.site.memory_file.read_bytes())["sequence"] >= entries)
    engines = {e["pid"] for e in place.status()["engines"]}
    postgres.stop()
    try:
        said = command(place, "status")
        assert said.returncode == 0 and "journal: DOWN" in said.stdout
        assert "host: runs, but cannot answer" in said.stdout
        done = command(place, "rollback", "--why", "night")
        assert done.returncode == 0, done.stderr
        assert "version 1 is stable again, was 2" in done.stdout
        assert place.split().stable == 1
        assert place.host.poll() is None
    finally:
        postgres.start()
    place.wait_for("the import", lambda: not place.site.emergency_file.exists())
    place.wait_for("the host", lambda: place.status()["models"]["demo"]["stable"] == 1)
    with Journal.open(place.site.journal) as journal:
        journal.verify()
        assert journal.entries()[-1].body["facts"]["emergency"]["who"] == "otto"
        assert journal.term() >= json.loads(place.site.split_file.read_bytes())["term"]
    assert {e["pid"] for e in place.status()["engines"]} == engines
    assert (place.split().stable, place.split().canary) == (1, None)
