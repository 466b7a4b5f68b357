"""Nobody changes the journal unseen: whatever is edited, removed, reordered or cut off, also by somebody who writes all
digests and tables anew, `proof.check` or the signed tip finds it."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mansard.canonical import canonical_json, sha256_json
from mansard.errors import BadInput, Corrupt
from mansard.records import Registration
from mansard.release import proof
from mansard.release.events import GENESIS, MOVES, Entry
from mansard.release.journal import Journal
from mansard.release.tip import Tip, check_tips, host_key, read_tip, sign_tip, write_tip
from mansard.site import Site

Make = Callable[..., Registration]


@pytest.fixture
def signed(site: Site, journal: Journal, candidate: Make) -> tuple[Site, Tip]:
    """Two versions, one released, one aborted; the host signed the end."""
    for number, name in enumerate(("one", "two"), 1):
        journal.register(candidate(name), None)
        journal.append("demo", "approved", "grace", "good", {"version": number})
        journal.start_rollout("demo", number, "otto", "", journal.pointers("demo"))
        journal.step("demo", number, 25, "host", "", journal.pointers("demo"))
        end = journal.promote if number == 1 else journal.abort
        end("demo", number, "host", "", journal.pointers("demo"))
    newest = journal.tip()
    assert newest is not None
    tip = sign_tip(site, newest)
    write_tip(site, tip)
    journal.close()
    return site, tip


def verify(site: Site, path: Path) -> None:
    tip, key = read_tip(site.tip_file), host_key(site)
    assert tip is not None and key is not None
    with Journal.open(path) as journal:
        whole = journal.whole()
    proof.check(whole)
    check_tips(whole, {"tip.json": tip}, key)


def read(path: Path) -> list[Entry]:
    with Journal.open(path) as journal:
        return journal.entries()


def chained(entries: list[Entry]) -> list[Entry]:
    """The same with sequences, digests and chain made anew."""
    made: list[Entry] = []
    for number, entry in enumerate(entries, 1):
        before = made[-1].digest if made else GENESIS
        entry = replace(entry, sequence=number, previous_digest=before)
        made.append(replace(entry, digest=entry.computed_digest()))
    return made


def write(path: Path, entries: list[Entry], with_tables: bool) -> None:
    """Put these entries into the file, and, for a thorough attacker, the tables that go with them."""
    with closing(sqlite3.connect(path)) as raw:
        for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            raw.execute(f"DROP TRIGGER {name}")
        raw.execute("DELETE FROM journal")
        for e in entries:
            values = (e.sequence, e.model, e.kind, e.at, e.who, e.why, canonical_json(e.body).decode())
            raw.execute(
                "INSERT INTO journal (sequence, model, kind, at, who, why, body, previous_digest, digest, format) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*values, e.previous_digest, e.digest, e.format),
            )
        if with_tables:
            raw.execute("DELETE FROM versions")
            raw.execute("DELETE FROM pointers")
            for e in entries:
                if e.kind == "registered":
                    digest = sha256_json(e.body["registration"])
                    raw.execute("INSERT INTO versions VALUES (?, ?, ?, ?)", (e.model, e.version, digest, e.sequence))
            after = [e.body["after"] for e in entries if e.kind in MOVES]
            if after:
                last = after[-1]
                values = ("demo", last["stable"], last["canary"], last["previous"], last["term"])
                raw.execute("INSERT INTO pointers VALUES (?, ?, ?, ?, ?)", values)
            raw.execute("UPDATE term SET number = ?", (after[-1]["term"] if after else 0,))
        raw.commit()


CHANGES = st.one_of(
    st.tuples(st.just("edit"), st.integers(0, 9), st.sampled_from(["who", "why", "at", "kind", "model", "body"])),
    st.tuples(st.just("remove"), st.integers(0, 9), st.just("")),
    st.tuples(st.just("swap"), st.integers(0, 8), st.just("")),
    st.tuples(st.just("cut"), st.integers(0, 9), st.just("")),
)


def attacked(entries: list[Entry], change: tuple[str, int, str]) -> list[Entry]:
    what, where, field = change
    if what == "remove":
        return entries[:where] + entries[where + 1 :]
    if what == "cut":
        return entries[:where]
    if what == "swap":
        first, second = entries[where], entries[where + 1]
        swapped = [replace(second, sequence=first.sequence), replace(first, sequence=second.sequence)]
        return [*entries[:where], *swapped, *entries[where + 2 :]]
    victim = entries[where]
    value: Any = {**victim.body, "facts": {"forged": True}} if field == "body" else f"{getattr(victim, field)}x"
    return [*entries[:where], replace(victim, **{field: value}), *entries[where + 1 :]]


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(CHANGES, min_size=1, max_size=3), is_thorough=st.booleans())
def test_whatever_was_changed_is_found(
    signed: tuple[Site, Tip], changes: list[tuple[str, int, str]], is_thorough: bool
) -> None:
    site, _ = signed
    path = site.home / "attacked.sqlite3"
    shutil.copy(site.home / "journal.sqlite3", path)
    entries = before = read(path)
    for change in changes:
        if change[1] + 1 < len(entries) or (change[0] != "swap" and change[1] < len(entries)):
            entries = attacked(entries, change)
    if entries == before:
        verify(site, path)
        return
    write(path, chained(entries) if is_thorough else entries, is_thorough)
    with pytest.raises(Corrupt):
        verify(site, path)


def test_an_untouched_journal_verifies_also_when_it_has_grown_since(signed: tuple[Site, Tip], candidate: Make) -> None:
    site, _ = signed
    path = site.home / "journal.sqlite3"
    verify(site, path)
    with Journal.open(path) as journal:
        journal.register(candidate("three"), None)
    verify(site, path)


def test_a_cut_off_end_and_a_journal_written_anew_are_told_apart(signed: tuple[Site, Tip]) -> None:
    site, tip = signed
    path = site.home / "journal.sqlite3"
    entries = read(path)
    write(path, entries[:-1], with_tables=True)
    with pytest.raises(Corrupt, match=f"ends with entry {tip.sequence - 1}.*entries were cut off"):
        verify(site, path)
    write(path, chained([replace(entries[0], who="mallory"), *entries[1:]]), with_tables=True)
    with pytest.raises(Corrupt, match=r"is not the one that the host signed.*written anew"):
        verify(site, path)


def test_a_forged_tip_is_refused(signed: tuple[Site, Tip]) -> None:
    """Who cuts the journal also writes the tip file anew, without the host's key."""
    site, tip = signed
    path = site.home / "journal.sqlite3"
    entries = read(path)[:-1]
    write(path, entries, with_tables=True)
    write_tip(site, replace(tip, sequence=entries[-1].sequence, digest=entries[-1].digest))
    with pytest.raises(Corrupt, match="is not signed by the host's key"):
        verify(site, path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"format": 2}', b"\xff", b'{"sequence": 1e999}'])
def test_a_damaged_tip_file_is_corrupt_in_one_line(site: Site, data: bytes) -> None:
    site.tip_file.write_bytes(data)
    with pytest.raises(Corrupt, match="not a signed tip"):
        read_tip(site.tip_file)
    site.tip_file.write_text(json.dumps({"format": 1, "sequence": "1", "digest": "", "at": "", "signature": ""}))
    with pytest.raises(Corrupt, match="not a signed tip of format 1"):
        read_tip(site.tip_file)


def test_the_site_may_name_the_hosts_key_for_another_machine(signed: tuple[Site, Tip]) -> None:
    site, _ = signed
    public = site.host_keys()[1].read_text().strip()
    named = replace(site, host_public_key=public)
    site.host_keys()[1].unlink()
    assert host_key(named) == bytes.fromhex(public)
    assert host_key(site) is None
    for wrong in ("gone.pub", "zz" * 32):
        with pytest.raises(BadInput, match="host_public_key"):
            host_key(replace(site, host_public_key=wrong))
