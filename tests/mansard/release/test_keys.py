"""Key pairs and signatures."""

import stat
from collections.abc import Callable

import pytest

from mansard.errors import BadInput, NotAllowed
from mansard.release import keys
from mansard.site import Site
from mansard.site_sections import Person


def test_a_key_pair_signs_and_verifies(site: Site) -> None:
    signature = keys.sign("ada", site, {"b": 1, "a": [1, 2]})
    assert keys.verify(site.public_key("ada"), {"a": [1, 2], "b": 1}, signature)
    assert not keys.verify(site.public_key("ada"), {"a": [1, 2], "b": 2}, signature)
    assert not keys.verify(site.public_key("grace"), {"a": [1, 2], "b": 1}, signature)
    for broken in ("", "zz", signature[:-2], signature[2:] + signature[:2], "ä"):
        assert not keys.verify(site.public_key("ada"), {"a": [1, 2], "b": 1}, broken)


def test_the_private_key_is_for_its_owner_only(site: Site) -> None:
    path, public = keys.generate_key("new", site)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(bytes.fromhex(path.read_text())) == 32
    assert (site.keys / "new.pub").read_text().strip() == public
    assert not list(site.keys.glob(".*"))
    path.chmod(0o644)
    (site.keys / "new.pub").unlink()
    with pytest.raises(NotAllowed, match="others may read it; run: chmod 600"):
        keys.generate_key("new", site)


def test_a_key_is_never_overwritten(site: Site) -> None:
    before = (site.keys / "ada.key").read_text()
    with pytest.raises(BadInput, match="never overwritten"):
        keys.generate_key("ada", site)
    assert (site.keys / "ada.key").read_text() == before


def test_a_generation_killed_between_the_files_is_completed(site: Site) -> None:
    private, public = (site.keys / "ada.key").read_text(), (site.keys / "ada.pub").read_text()
    (site.keys / "ada.pub").unlink()
    keys.generate_key("ada", site)
    assert (site.keys / "ada.key").read_text() == private
    assert (site.keys / "ada.pub").read_text() == public


@pytest.mark.parametrize("name", ["", "../ada", "a/b", ".hidden", "a b", "ä", "a" * 65])
def test_a_name_that_is_no_plain_word_is_refused(site: Site, name: str) -> None:
    with pytest.raises(BadInput, match="cannot name a key"):
        keys.generate_key(name, site)


def test_signing_needs_a_known_person_and_their_matching_key(
    site: Site, with_people: Callable[..., Site]
) -> None:
    with pytest.raises(NotAllowed, match="'mallory' is not one of the people"):
        keys.sign("mallory", site, {})
    swapped = with_people(ada=Person(("author",), site.public_key("grace").hex()))
    with pytest.raises(NotAllowed, match="not the key that"):
        keys.sign("ada", swapped, {})
    (site.keys / "ada.key").write_text("short\n")
    with pytest.raises(NotAllowed, match="64 hex digits"):
        keys.sign("ada", site, {})
    (site.keys / "ada.key").unlink()
    with pytest.raises(NotAllowed, match="mansard keygen ada"):
        keys.sign("ada", site, {})
