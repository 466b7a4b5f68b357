"""A model as the journal has it at one look: what the host decides on until the next one."""

from dataclasses import dataclass

from mansard.release.events import Entry, Pointers
from mansard.release.journal import Journal
from mansard.release.window import resident_versions


@dataclass(frozen=True, slots=True)
class JournalView:
    """`moves` as `Journal.moves`, `term` the global one, `resident` the versions that stay warm, stable first."""

    pointers: Pointers
    moves: tuple[Entry, ...]
    term: int
    resident: tuple[int, ...]


def view_of(journal: Journal, model: str, rollback_window: int) -> JournalView:
    pointers, moves = journal.pointers(model), journal.moves(model)
    resident = resident_versions(moves, model, pointers, rollback_window)
    return JournalView(pointers, tuple(moves), journal.term(), tuple(resident))
