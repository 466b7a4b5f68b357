"""Whether anybody changed the journal behind its back. Pure: everything is read before.

Finds an edited, removed or reordered entry by the chain; pointers, versions or a term that no entry explains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mansard.canonical import sha256_json
from mansard.errors import Corrupt
from mansard.release.events import GENESIS, MOVES, REGISTERED, Entry, Pointers


@dataclass(frozen=True, slots=True)
class Whole:
    """Everything that a journal holds, read at one moment. `versions`: (model, version, registration digest, entry)."""

    name: str
    entries: Sequence[Entry]
    versions: frozenset[tuple[str, int, str, int]]
    pointers: Mapping[str, Pointers]
    term: int


def check(whole: Whole) -> None:
    """Raises Corrupt that names the first bad entry, or the table that no entry explains."""
    check_chain(whole)
    try:
        _check_tables(whole)
    except (KeyError, TypeError, ValueError) as error:  # a whole chain of entries that Mansard never wrote
        raise Corrupt(f"journal {whole.name}: an entry's body lacks what its kind needs: {error!r}") from error


def _check_tables(whole: Whole) -> None:
    versions = {
        (e.model, e.version, sha256_json(e.body["registration"]), e.sequence)
        for e in whole.entries
        if e.kind == REGISTERED
    }
    if versions != whole.versions:
        odd = sorted(map(str, versions ^ whole.versions))[0]
        raise Corrupt(f"journal {whole.name}: the versions table and the registered entries differ at {odd}")
    told = {e.model: Pointers(**e.body["after"]) for e in whole.entries if e.kind in MOVES}
    if told != whole.pointers or whole.term != max((p.term for p in told.values()), default=0):
        last = whole.entries[-1].sequence if whole.entries else 0
        raise Corrupt(
            f"journal {whole.name}: after entry {last} the pointers are {dict(whole.pointers)}, term {whole.term}, but "
            f"the entries say {told}: entries were cut off, or pointers changed without an entry"
        )


def check_chain(whole: Whole) -> None:
    """Each entry is what its digest says, and follows the one before."""
    before = GENESIS
    for number, entry in enumerate(whole.entries, 1):
        if entry.sequence != number:
            raise Corrupt(f"journal {whole.name}: entry {number} is missing; the next one there is {entry.sequence}")
        if entry.digest != entry.computed_digest():
            raise Corrupt(
                f"journal {whole.name}: entry {number} ({entry.kind} {entry.model}, {entry.at}) was changed: its "
                f"content has digest {entry.computed_digest()[:12]}, recorded is {entry.digest[:12]}"
            )
        if entry.previous_digest != before:
            raise Corrupt(f"journal {whole.name}: entry {number} does not follow entry {number - 1}: one was replaced")
        before = entry.digest
