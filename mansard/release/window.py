"""Which versions stay resident and warm: those in service and the ones a rollback may go to. Pure."""

from collections.abc import Iterable

from mansard.release.events import PROMOTED, ROLLED_BACK, Entry, Pointers


def resident_versions(moves: Iterable[Entry], model: str, pointers: Pointers, rollback_window: int) -> list[int]:
    """Stable, canary, `previous`, and further earlier stables that were not rolled back, newest promotion first.

    `rollback_window` counts the earlier versions. `moves` are in the journal's order.
    """
    promoted: dict[int, int] = {}
    left: dict[int, int] = {}
    for entry in moves:
        if entry.model == model and entry.version is not None:
            if entry.kind == PROMOTED:
                promoted[entry.version] = entry.sequence
            elif entry.kind == ROLLED_BACK:
                left[entry.version] = entry.sequence
    since = promoted.get(pointers.stable, 0) if pointers.stable is not None else 0
    earlier = [v for v, at in promoted.items() if at < since and left.get(v, 0) < at]
    earlier.sort(key=lambda version: -promoted[version])
    named = [v for v in (pointers.stable, pointers.canary) if v is not None]
    window = [pointers.previous, *earlier] if pointers.previous is not None else earlier
    kept = list(dict.fromkeys(v for v in window if v is not None and v not in named))
    return [*named, *kept[:rollback_window]]
