"""Rows of a data set of the Hub, streamed through `datasets`. It is loaded here only, where a spec names such a set."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mansard.errors import BadInput, MansardError


def check_hub(name: str, where: str) -> None:
    """BadInput where `datasets` would read a folder of this machine, to which no revision applies."""
    if Path(name).exists() or name.count("/") != 1:
        raise BadInput(f"{where}: hub: {name} is no OWNER/NAME of the Hub; name a folder with path")


def hub_rows(
    name: str, config: str | None, revision: str | None, split: str, column: str, where: str
) -> Iterator[str]:
    """The column's strings in the set's order, without keeping them. BadInput for a revision, configuration, split or
    column that is not there; MansardError where the Hub cannot be reached."""
    for number, row in enumerate(_opened(name, config, revision, split, where)):
        if column not in row:
            raise BadInput(f"{where}: {name}: no column {column}; it has {', '.join(row)}: name one with column")
        if not isinstance(row[column], str):
            raise BadInput(f"{where}: {name}: row {number} of {column} is {row[column]!r:.60}, not a string")
        yield row[column]


def _opened(name: str, config: str | None, revision: str | None, split: str, where: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    what = f"{where}: {name} at {revision}, split {split}"
    try:
        yield from load_dataset(name, config, revision=revision, split=split, streaming=True)
    except (DatasetNotFoundError, ValueError) as error:
        raise BadInput(f"{what}: {_line(error)}") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, DatasetsError, OSError) as error:
        raise MansardError(f"{what}: cannot be fetched: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
