"""What this machine remembers of the journal, for a rollback while its database is down: pointers, moves, artifacts.

The host writes it when the journal has grown, and a rollback without the host when it has moved. It may be a moment
old; where the traffic split has a later term, stable and canary are the split's. Standard library only.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from mansard.canonical import canonical_json, write_atomically
from mansard.errors import Corrupt, JournalDamaged
from mansard.release.events import MOVES, OUTAGES, PROMOTED, REGISTERED, ROLLED_BACK, Entry, Pointers
from mansard.release.journal import Journal
from mansard.site import Site

WORDS = ("version", "to", "weight_percent", "uptime")
"""What is kept of a move's body."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """One model. `artifacts`: version -> artifact, of every registered version."""

    pointers: Pointers = field(default_factory=Pointers)
    moves: tuple[Entry, ...] = ()
    artifacts: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Memory:
    """`sequence` and `digest` are of the newest entry that it knows; 0 and empty where nothing was ever remembered."""

    sequence: int = 0
    digest: str = ""
    term: int = 0
    models: dict[str, Remembered] = field(default_factory=dict)


def remember(site: Site, journal: Journal) -> None:
    """Write down where the journal stands."""
    tip = journal.tip()
    if tip is None:
        return
    models = {model: _model(journal, model) for model in site.models}
    tree = {"format": 1, "sequence": tip.sequence, "digest": tip.digest, "term": journal.term(), "models": models}
    write_atomically(site.memory_file, canonical_json(tree) + b"\n")


def recall(site: Site) -> Memory:
    """What is written down; nothing where nothing is. Corrupt for a damaged file."""
    try:
        tree = json.loads(site.memory_file.read_bytes())
        if tree["format"] != 1:
            raise ValueError(f"format {tree['format']!r}")
        models = {
            name: Remembered(
                Pointers(**model["pointers"]),
                tuple(Entry(**entry) for entry in model["moves"]),
                {int(version): str(artifact) for version, artifact in model["artifacts"].items()},
            )
            for name, model in tree["models"].items()
        }
        return Memory(int(tree["sequence"]), str(tree["digest"]), int(tree["term"]), models)
    except FileNotFoundError:
        return Memory()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{site.memory_file}: not what the host remembered: {error!r}") from error


def with_split(known: Remembered, model: str, split: dict[str, Any], term: int) -> Remembered:
    """The model as it stands where the split's term is later: a move that nobody wrote down is guessed from it.

    `split` is the model's part of the file. Another stable that was `previous` was rolled back to, else promoted; a
    version that stands in for a dead stable is not stable.
    """
    stable, before = split.get("stands_in_for") or split["stable"], known.pointers
    if term <= before.term or (stable, split["canary"]) == (before.stable, before.canary):
        return known
    moves = known.moves
    previous = before.previous
    if stable != before.stable:
        went_back = stable == before.previous
        body = {"version": before.stable, "to": stable} if went_back else {"version": stable}
        kind = ROLLED_BACK if went_back else PROMOTED
        sequence = moves[-1].sequence + 1 if moves else 1
        moves = (*moves, Entry(sequence, model, kind, "1970-01-01T00:00:00Z", "the traffic split", "", body, "", ""))
        previous = None if went_back else before.stable
    return Remembered(Pointers(stable, split["canary"], previous, term), moves, known.artifacts)


def _model(journal: Journal, model: str) -> dict[str, Any]:
    moves = [e for e in journal.entries(model, kinds=(*MOVES, *OUTAGES)) if e.kind != "canary_step"]
    try:
        artifacts = {
            str(e.version): e.body["registration"]["artifact"] for e in journal.entries(model, kinds=(REGISTERED,))
        }
    except (KeyError, TypeError) as error:
        raise JournalDamaged(f"journal {journal.name}: a registered entry of {model} without artifact") from error
    return {
        "pointers": asdict(journal.pointers(model)),
        "moves": [asdict(e) | {"body": {w: e.body[w] for w in WORDS if w in e.body}} for e in moves],
        "artifacts": artifacts,
    }
