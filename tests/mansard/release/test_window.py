"""Which versions stay warm."""

from mansard.release.events import PROMOTED, ROLLED_BACK, Entry, Pointers
from mansard.release.window import resident_versions


def moves(*moved: tuple[str, int] | tuple[str, int, int]) -> list[Entry]:
    """("promoted", version) or ("rolled_back", version, to), in order."""
    bodies = [{"version": m[1], **({"to": m[2]} if len(m) == 3 else {})} for m in moved]
    kinds = [m[0] for m in moved]
    return [
        Entry(i, "demo", kind, "2026-01-01T00:00:00.000000Z", "ada", "", body, "", "")
        for i, (kind, body) in enumerate(zip(kinds, bodies, strict=True), 1)
    ]


WALKED = moves((PROMOTED, 1), (PROMOTED, 2), (PROMOTED, 3), (PROMOTED, 4))


def test_stable_canary_and_as_many_earlier_versions_as_the_window_holds_stay() -> None:
    assert resident_versions(WALKED, "demo", Pointers(4, 5, 3, 9), 2) == [4, 5, 3, 2]
    assert resident_versions(WALKED, "demo", Pointers(4, None, 3, 9), 0) == [4]


def test_a_version_that_was_rolled_back_leaves() -> None:
    entries = moves((PROMOTED, 1), (PROMOTED, 2), (PROMOTED, 3), (ROLLED_BACK, 3, 2))
    assert resident_versions(entries, "demo", Pointers(2, None, 1, 9), 2) == [2, 1]


def test_nothing_is_resident_before_the_first_release() -> None:
    assert resident_versions([], "demo", Pointers(), 2) == []
    assert resident_versions(WALKED, "other", Pointers(None, 1, None, 1), 2) == [1]
