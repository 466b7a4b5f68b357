"""Journals with versions in them, as tests begin with."""

from dataclasses import replace
from pathlib import Path

from mansard.records import Registration
from mansard.release.journal import Journal

Place = Path | str


def plain(name: str = "one", **fields: object) -> Registration:
    """A registration whose snapshots exist nowhere; the journal does not look."""
    digest = name.encode().hex().ljust(64, "0")
    made = Registration(
        *("demo", digest, digest, "pass", digest, digest, (("bits", digest),), 1, 1, 1, "ada", "demo", digest),
        serve={"dtype": "bfloat16"},
        release={"steps": [{"bake_seconds": 0.5}]},
        stages=(("quantize", digest, digest),),
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def release(journal: Journal, version: int) -> None:
    journal.start_rollout("demo", version, "ada", "", journal.pointers("demo"))
    journal.step("demo", version, 50, "host", "", journal.pointers("demo"), {"step": 1, "steps": 2})
    journal.promote("demo", version, "host", "all steps pass", journal.pointers("demo"))


def filled(place: Place) -> Journal:
    """Two versions released, one rolled back, one aborted."""
    journal = Journal.open(place)
    for name in ("one", "two", "three"):
        journal.register(plain(name), None)
    release(journal, 1)
    release(journal, 2)
    journal.rollback("demo", 1, "ada", "bad answers", journal.pointers("demo"))
    journal.start_rollout("demo", 3, "ada", "", journal.pointers("demo"))
    journal.abort("demo", 3, "host", "dead engine", journal.pointers("demo"))
    return journal
