"""Mansard's library: everything that is true without an orchestrator.

It imports neither prefect nor mlflow. Imports point one way; `pyproject.toml` (import-linter) says which.
People who write code start from `expand`, `train`, `fuse`, `save` and `Text` (mansard/api.py), loaded when first named.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mansard.api import Text, expand, fuse, save, train

__all__ = ["Text", "expand", "fuse", "save", "train"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562: nothing is loaded before it is asked for
    if name not in __all__:
        raise AttributeError(f"module 'mansard' has no attribute {name!r}")
    from mansard import api

    return getattr(api, name)
