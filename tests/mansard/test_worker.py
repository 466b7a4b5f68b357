"""What a stage tells its parent."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from mansard.store.store import Store
from mansard.worker import Channel, StageContext


def test_progress_in_numpys_numbers_arrives_as_numbers(store: Store) -> None:
    stream = io.StringIO()
    context = StageContext(store, "a" * 64, {}, {}, {}, Path("nowhere"), Channel(stream))
    context.progress(np.int64(3), np.int32(8), "rows", "counting", loss=np.float32(0.5), rows=np.array(7))
    (line,) = stream.getvalue().splitlines()
    progress = json.loads(line)["progress"]
    assert (progress["done"], progress["total"], progress["metrics"]) == (3, 8, {"loss": 0.5, "rows": 7})


def test_what_is_no_number_is_an_error_that_names_it(store: Store) -> None:
    context = StageContext(store, "a" * 64, {}, {}, {}, Path("nowhere"), Channel(io.StringIO()))
    with pytest.raises(TypeError, match=r"holds a PosixPath .*nowhere"):
        context.progress(1, 2, Path("nowhere"))  # type: ignore[arg-type]
