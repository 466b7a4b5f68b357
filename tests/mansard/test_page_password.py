"""The file of the pages' password: private, made once, refused when it is not."""

import dataclasses
import stat
from pathlib import Path

import pytest

from mansard.errors import BadInput
from mansard.page_password import authorization, create_password, fingerprint, login_text, password_file, read_password
from mansard.site import Site, load_site

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return dataclasses.replace(load_site(ROOT / "configs/site/local.yaml"), home=tmp_path / "home")


def test_password_is_made_once_in_a_private_file(site: Site) -> None:
    assert read_password(site) is None
    assert authorization(site) == {}
    assert create_password(site)
    password = read_password(site)
    assert password is not None
    assert len(password) == 64
    assert not create_password(site)
    assert read_password(site) == password
    file = password_file(site)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (file, file.parent)] == [0o600, 0o700]
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert password not in login_text(site) + fingerprint(site)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622, 0o644])
def test_file_that_others_may_read_or_write_is_refused(site: Site, mode: int) -> None:
    create_password(site)
    password_file(site).chmod(mode)
    for action in (read_password, create_password, authorization):
        with pytest.raises(BadInput, match=f"not private .mode {mode:o}.*delete the file"):
            action(site)


@pytest.mark.parametrize("text", ["", "short", "with: colon" * 8])
def test_damaged_file_is_refused(site: Site, text: str) -> None:
    create_password(site)
    password_file(site).write_text(text)
    with pytest.raises(BadInput, match="no password of the pages"):
        create_password(site)


def test_site_without_authentication_says_what_that_lets_in(site: Site) -> None:
    create_password(site)
    off = dataclasses.replace(site, authentication="none")
    assert read_password(off) is None
    assert not create_password(off)
    assert "every user of this machine" in login_text(off)
    assert fingerprint(off) != fingerprint(site)
