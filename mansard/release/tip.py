"""The signed tip: which entry was the journal's newest, kept outside of the journal and signed by the host.

The chain of digests finds an entry that was changed, removed or moved, but not an end that was cut off, and not a
journal that was written anew from some entry on. A tip finds both: its entry must be there, with its digest. It lies in
the site's home (tip.json) and, by the mirror, in MLflow. Entries after the newest tip are covered by the chain alone.
Not covered: an attacker who has the host's private key (home/host.key).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mansard.canonical import canonical_json, write_atomically
from mansard.errors import BadInput, Corrupt
from mansard.release import keys
from mansard.release.events import Entry, as_text, utc_now
from mansard.release.proof import Whole
from mansard.site import Site

HOST = "host"


@dataclass(frozen=True, slots=True)
class Tip:
    """`at` is when it was signed, UTC."""

    format: int
    sequence: int
    digest: str
    at: str
    signature: str

    def payload(self) -> dict[str, Any]:
        """What is signed."""
        return {"record": "tip", **{k: v for k, v in asdict(self).items() if k != "signature"}}

    def as_bytes(self) -> bytes:
        return canonical_json(asdict(self)) + b"\n"


def sign_tip(site: Site, entry: Entry) -> Tip:
    """The host's word that `entry` is the newest. Makes the host's key where there is none."""
    private_file, public_file = site.host_keys()
    keys.make_pair(private_file, public_file, HOST)
    tip = Tip(1, entry.sequence, entry.digest, as_text(utc_now()), "")
    return Tip(tip.format, tip.sequence, tip.digest, tip.at, keys.sign_with(private_file, HOST, tip.payload()))


def write_tip(site: Site, tip: Tip) -> None:
    write_atomically(site.tip_file, tip.as_bytes())


def read_tip(path: Path) -> Tip | None:
    """None where there is none; Corrupt for a damaged file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return parse_tip(data, str(path))


def parse_tip(data: bytes, where: str) -> Tip:
    """Corrupt for what is no tip. The signature is not looked at."""
    try:
        tip = Tip(**json.loads(data))
        is_whole = (type(tip.sequence), type(tip.digest), type(tip.signature)) == (int, str, str) and tip.format == 1
    except (ValueError, TypeError) as error:
        raise Corrupt(f"{where}: not a signed tip: {error}; mansard verify --journal without it proves less") from error
    if not is_whole:
        raise Corrupt(f"{where}: not a signed tip of format 1")
    return tip


def host_key(site: Site) -> bytes | None:
    """The public key that tips must be signed by: the site's, else the one the host made here; None before the first.

    BadInput for one that cannot be read.
    """
    text, source = site.host_public_key, f"{site.path}: host_public_key"
    if len(text) != 64:
        path = site.path.parent / text if text else site.host_keys()[1]
        if not text and not path.exists():
            return None
        try:
            text, source = path.read_text().strip(), str(path)
        except OSError as error:
            raise BadInput(f"{source}: cannot read {path}: {error.strerror}") from error
    try:
        raw = bytes.fromhex(text)
    except ValueError as error:
        raise BadInput(f"{source}: not a public key: 64 hex digits are expected") from error
    if len(raw) != 32:
        raise BadInput(f"{source}: a public key has 32 bytes, this has {len(raw)}")
    return raw


def check_tips(whole: Whole, tips: Mapping[str, Tip], public_key: bytes) -> None:
    """Corrupt unless every tip (where it was found -> tip) is signed by the host and its entry is in the journal."""
    for where, tip in tips.items():
        if not keys.verify(public_key, tip.payload(), tip.signature):
            raise Corrupt(f"{where}: the tip of entry {tip.sequence} is not signed by the host's key")
        if tip.sequence > len(whole.entries):
            raise Corrupt(
                f"journal {whole.name}: it ends with entry {len(whole.entries)}, but {where} has a signed tip of entry "
                f"{tip.sequence} from {tip.at}: entries were cut off"
            )
        found = whole.entries[tip.sequence - 1].digest if tip.sequence > 0 else ""
        if found != tip.digest:
            raise Corrupt(
                f"journal {whole.name}: entry {tip.sequence} is not the one that the host signed ({where}, {tip.at}): "
                "the journal was written anew"
            )
