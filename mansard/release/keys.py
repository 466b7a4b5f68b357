"""Ed25519 keys of people, and signatures over canonical JSON.

NAME.key holds the 32 raw private bytes as hex, mode 600, in the folder `site.keys`; NAME.pub the public key as 64 hex
digits. A key is never overwritten. Whose key counts, and when, says the site's people section.
"""

import os
import re
import stat
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mansard.canonical import canonical_json, write_atomically
from mansard.errors import BadInput, MansardError, NotAllowed
from mansard.site import Site
from mansard.site_checks import RESERVED_NAMES
from mansard.site_sections import Person

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def generate_key(name: str, site: Site) -> tuple[Path, str]:
    """Make a pair for `name`; returns the private key's path and the public key (64 hex digits).

    Raises BadInput for a name that is not a plain word, or when there is a key already.
    """
    if not _NAME.fullmatch(name):
        raise BadInput(f"{name!r} cannot name a key: letters, digits, dot, dash and underscore are expected")
    if name in RESERVED_NAMES:
        raise BadInput(f"{name!r} is no person: the journal names the host so; take another name")
    private_file, public_file = site.keys / f"{name}.key", site.keys / f"{name}.pub"
    if public_file.exists():
        raise BadInput(f"{public_file} exists, and a key is never overwritten; move it away or take another name")
    return private_file, make_pair(private_file, public_file, name)


def make_pair(private_file: Path, public_file: Path, name: str) -> str:
    """The public key (64 hex digits) of a pair in these files; what is missing of it is made."""
    if not private_file.exists():  # otherwise an earlier call was killed between the two files
        _write_once(private_file, Ed25519PrivateKey.generate().private_bytes_raw().hex().encode() + b"\n")
    public = _read_private(private_file, name).public_key().public_bytes_raw().hex()
    if not public_file.exists():
        write_atomically(public_file, public.encode() + b"\n")
    return public


def sign_with(private_file: Path, name: str, payload: Mapping[str, Any]) -> str:
    """Hex signature over the canonical JSON of `payload` by the private key in this file."""
    return _read_private(private_file, name).sign(canonical_json(dict(payload))).hex()


def sign(name: str, site: Site, payload: Mapping[str, Any]) -> str:
    """Hex signature over the canonical JSON of `payload` by the person's key on this machine.

    Raises NotAllowed for a stranger, without the private key, or when it is not the one the site knows.
    """
    require_person(site, name)
    private = _read_private(site.keys / f"{name}.key", name)
    if private.public_key().public_bytes_raw() != site.public_key(name):
        raise NotAllowed(
            f"{site.keys / f'{name}.key'} is not the key that {site.path} knows for {name}; "
            f"put the key's public half (NAME.pub) there under people.{name}.public_key"
        )
    return private.sign(canonical_json(dict(payload))).hex()


def verify(public_key: bytes, payload: Mapping[str, Any], signature: str) -> bool:
    """Whether the owner of `public_key` signed `payload`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(bytes.fromhex(signature), canonical_json(dict(payload)))
    except (InvalidSignature, ValueError):  # ValueError: not hex
        return False
    return True


def require_person(site: Site, name: str, role: str | None = None) -> None:
    """NotAllowed unless the site knows `name`, with `role` where one is asked for."""
    if name not in site.people:
        known = ", ".join(site.people) or "nobody"
        raise NotAllowed(f"{name!r} is not one of the people of {site.path}: {known}")
    if role is not None and role not in site.people[name].roles:
        able = ", ".join(n for n, p in site.people.items() if role in p.roles) or "nobody"
        has = ", ".join(site.people[name].roles) or "none"
        raise NotAllowed(f"{name} has the roles {has}, not {role}; who may: {able}")


def require_key(site: Site, name: str, role: str, now: datetime) -> None:
    """NotAllowed unless the person has the role and their key counts now: valid, and not revoked."""
    require_person(site, name, role)
    trouble = key_trouble(site.people[name], now)
    if trouble:
        raise NotAllowed(f"{name}'s key {trouble} by {site.path}; with a new key (mansard keygen) {name} signs again")


def key_trouble(person: Person, now: datetime) -> str:
    """Why a person's key does not count now; empty when it does."""
    if person.revoked:
        return f"is revoked ({person.revoked})"
    if person.valid_from is not None and now < person.valid_from:
        return f"is valid from {person.valid_from.isoformat()} on, not yet"
    if person.valid_until is not None and now >= person.valid_until:
        return f"was valid until {person.valid_until.isoformat()}"
    return ""


def _read_private(path: Path, name: str) -> Ed25519PrivateKey:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text().strip()
    except FileNotFoundError as error:
        raise NotAllowed(
            f"no private key of {name} here: {path} is missing; make one with: mansard keygen {name}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise NotAllowed(f"{path}: cannot read {name}'s private key: {error}") from error
    if mode & 0o077:
        raise NotAllowed(f"{path} has mode {mode:o}, so others may read it; run: chmod 600 {path}")
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(text))
    except ValueError as error:
        raise NotAllowed(f"{path}: not a private key: 64 hex digits are expected") from error


def _write_once(path: Path, data: bytes) -> None:
    """Like write_atomically, but never over a file that is there (a link fails where a rename would not)."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(beside, data, mode=0o600)
        os.link(beside, path)
    except FileExistsError as error:
        raise BadInput(f"{path} exists, and a key is never overwritten; move it away or take another name") from error
    except OSError as error:
        raise MansardError(f"{path}: cannot write the key: {error}") from error
    finally:
        beside.unlink(missing_ok=True)
