"""A home's modes: what an older program left open is closed; a key that others could read is refused."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mansard.errors import NotAllowed
from mansard.private_files import close_home, open_paths, use_private_umask
from mansard.release.journal import Journal
from mansard.site import Site, load_site

SITE = """
format: 1
home: home
data: data
models: [tiny]
environments: {main: {python: /usr/bin/env, lock: none}, serve: {python: /usr/bin/env, lock: none}}
stages: {default: main}
"""


@pytest.fixture(autouse=True)
def mask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "site.yaml").write_text(SITE)
    return load_site(tmp_path / "site.yaml")


def test_a_home_of_an_older_program_is_closed_with_one_line(site: Site) -> None:
    (site.home / "mlflow/artifacts").mkdir(parents=True)
    (site.home / "mlflow/mlflow.sqlite3").write_text("")
    (site.store / "trees").mkdir(parents=True)
    (site.store / "trees/config.json").write_text("{}")
    (site.home / "link").symlink_to("/etc/passwd")
    with Journal.open(site.journal):
        (line,) = close_home(site)
    assert "open to other users" in line
    assert (open_paths(site), close_home(site)) == ([], [])
    assert site.home.stat().st_mode & 0o777 == 0o700
    assert (site.home / "mlflow/mlflow.sqlite3").stat().st_mode & 0o777 == 0o600
    assert (site.store / "trees/config.json").stat().st_mode & 0o777 == 0o644
    assert Path("/etc/passwd").stat().st_mode & 0o044 == 0o044


def test_a_private_key_that_others_could_read_is_refused_and_stays_as_it_is(site: Site) -> None:
    key = site.home / "keys/ada.key"
    key.parent.mkdir(parents=True)
    key.write_text("00" * 32)
    with pytest.raises(NotAllowed, match=r"ada\.key: others may read this private key \(mode 644\)"):
        close_home(site)
    assert key.stat().st_mode & 0o777 == 0o644
    key.chmod(0o600)
    close_home(site)
    assert open_paths(site) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_cannot_read_a_journal(site: Site, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)  # pytest's own folders, so that only the home's mode counts
    read = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", str(site.journal)]
    with Journal.open(site.journal):
        pass
    assert subprocess.run(read, capture_output=True).returncode == 0
    close_home(site)
    assert b"Permission denied" in subprocess.run(read, capture_output=True).stderr
    for path in (site.home, *site.home.iterdir()):
        path.chmod(0o755)
    use_private_umask()
    Path(site.journal).unlink()
    with Journal.open(site.journal):
        pass
    assert b"Permission denied" in subprocess.run(read, capture_output=True).stderr
