"""Stage `corpus`: the demo's training text, held-out text and suite items.

Spec: {"format": 1, "seed", "train_code_bytes", "train_docstring_bytes" (null: all), "items_per_suite", "choice_items",
"python": the Python version whose library is read (part of the recipe, so another version is another corpus)}.
"""

import platform
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from mansard.demo.corpus import corpus_files
from mansard.errors import BadInput
from mansard.records import SnapshotId

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 3
PACKAGES = ()


def run(context: "StageContext") -> SnapshotId:
    spec = context.spec
    if spec["format"] != 1:
        raise BadInput(f"corpus: format {spec['format']!r}: 1 is expected")
    if spec["python"] != platform.python_version():
        raise BadInput(f"corpus: python {spec['python']!r}: this stage's interpreter is {platform.python_version()}")
    files = corpus_files(
        Path(sysconfig.get_path("stdlib")),
        spec["seed"],
        {"code": spec["train_code_bytes"], "docstrings": spec["train_docstring_bytes"]},
        spec["items_per_suite"],
        spec["choice_items"],
    )
    context.progress(len(files), len(files), "files", ", ".join(f"{n} {len(b):,} bytes" for n, b in files.items()))
    snapshot: SnapshotId = context.store.put_files(files)
    return snapshot
