"""Where a rollback goes back to is asked of a real bucket after the move."""

from dataclasses import replace
from typing import Any

import pytest

from mansard.release import target_check
from mansard.release.target_check import later_warnings
from mansard.site import Site
from mansard.store.store import Store


def test_a_bucket_that_answers_warns_of_damage_alone(
    site: Site, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_check, "LATER_SECONDS", 60.0)  # a busy machine is not this test's subject
    with_bucket = replace(site, store_url=bucket_url)
    artifact = Store.of(with_bucket).put_files({"model.bin": b"weights"})
    assert later_warnings(with_bucket, 2, artifact) == []
    (warning,) = later_warnings(with_bucket, 2, "0" * 64)
    assert warning.startswith("version 2: its artifact 000000000000 is not whole in s3://")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_look_that_fails_in_an_unforeseen_way_is_not_taken_for_a_whole_artifact(site: Site, bucket_url: str) -> None:
    """Here: a journal's entry whose artifact is no text."""
    artifact: Any = 7
    (warning,) = later_warnings(replace(site, store_url=bucket_url), 2, artifact)
    assert "so its artifact was not checked" in warning
