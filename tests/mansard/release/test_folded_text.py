"""Text fits its screen where words allow it, and no word of it is lost or broken."""

from hypothesis import given
from hypothesis import strategies as st

from mansard.release.folded_text import fold, table

WORDS = st.text(st.sampled_from("abc-/é"), min_size=1, max_size=12)
LINES = st.lists(st.builds(lambda indent, words: " " * indent + " ".join(words), st.integers(0, 4), st.lists(WORDS)))
CELLS = st.lists(WORDS, max_size=5).map(" ".join)


@given(LINES, st.integers(1, 60))
def test_a_folded_text_has_every_word_whole_and_no_line_that_could_be_shorter(lines: list[str], columns: int) -> None:
    folded = fold("\n".join(lines), columns)
    assert folded.split() == " ".join(lines).split()
    for line in folded.split("\n"):
        assert len(line) <= columns or len(line.split()) == 1


@given(LINES)
def test_where_no_person_looks_nothing_is_folded(lines: list[str]) -> None:
    text = "\n".join(lines)
    assert fold(text, None) == text


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=4), st.integers(4, 60))
def test_a_table_fits_or_becomes_blocks_and_has_every_word_whole(
    rows: list[tuple[str, str, str]], columns: int
) -> None:
    shown = table(("a", "bb", "c"), rows, columns)
    words = sorted(" ".join(" ".join(row) for row in rows).split())
    names = {"a", "bb", "c", "a:", "bb:", "c:"}
    assert sorted(w for w in shown.split() if w not in names) == [w for w in words if w not in names]
    for line in shown.split("\n"):
        assert len(line) <= columns or len(line.split()) == 1
