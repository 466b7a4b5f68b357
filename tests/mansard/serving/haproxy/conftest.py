"""HAProxy stands where router workers do, on the same rig."""

from tests.mansard.serving.router.conftest import make_rig, tmp_path

__all__ = ["make_rig", "tmp_path"]
