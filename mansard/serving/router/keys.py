"""Who may ask: keys by their SHA-256, never as they are. Tenants' API keys and operators' tokens are files of one form.

The file (YAML or JSON) maps a NAME to the digest of its key, to a list of digests (a key being replaced), or to
`{keys: [...], requests_per_minute: 600, models: [demo]}`; without the last two: no rate limit, every model. A key:
`openssl rand -hex 32`; its digest: `printf %s KEY | sha256sum`. Keys are long and random, so a plain digest is enough.
Guarantees: a damaged file changes nothing (the keys read before stay in force) and is reported; a removed key is
refused from the next look on (a second at most). Not covered: answers under way for a key that is removed.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from mansard.errors import BadInput
from mansard.serving.router.policy import Refused

MAX_NAMES = 8192
_KEYS = ("keys", "requests_per_minute", "models")


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose key it is. `slot` is the name's place in the sorted file, the same in every worker.

    `models` is None for every model, `requests_per_minute` None for no limit.
    """

    name: str
    slot: int = 0
    requests_per_minute: int | None = None
    models: frozenset[str] | None = None

    def check_model(self, model: str) -> None:
        """Another tenant's model does not exist for this one."""
        if self.models is not None and model not in self.models:
            raise Refused(404, "not_found_error", f"model {model[:80]!r} does not exist")


class KeyFile:
    """The holders of a file, by the digest of their keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._holders: dict[bytes, Holder] = {}
        self._stamp: tuple[int, int, int] | None = None

    def read(self) -> None:
        """Read the file when it changed. Raises BadInput and keeps the keys read before."""
        try:
            status = self.path.stat()
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if stamp == self._stamp:
                return
            tree = yaml.safe_load(self.path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise BadInput(f"{self.path}: cannot read the keys: {' '.join(str(error).split())}") from error
        self._holders = parse_holders(tree, self.path)
        self._stamp = stamp

    def has(self, key: str) -> bool:
        """Whether it is one of these."""
        return hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest() in self._holders

    def digests(self) -> list[str]:
        """In hex."""
        return sorted(digest.hex() for digest in self._holders)

    def holder(self, headers: Mapping[str, str]) -> Holder:
        """Whose key the request carries; 401 for none or an unknown one."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        holder = self._holders.get(digest) if scheme.lower() == "bearer" else None
        if holder is None:
            raise Refused(401, "authentication_error", "send a valid API key: Authorization: Bearer KEY")
        return holder


def parse_holders(tree: object, path: Path) -> dict[bytes, Holder]:
    """Holders by the digest of their keys. BadInput names the file and the name; never a key."""
    if not isinstance(tree, dict):
        raise BadInput(f"{path}: {type(tree).__name__} where a mapping NAME: SHA-256 is expected")
    if len(tree) > MAX_NAMES:
        raise BadInput(f"{path}: {len(tree)} names; at most {MAX_NAMES} are taken")
    holders: dict[bytes, Holder] = {}
    for slot, name in enumerate(sorted(tree, key=str)):
        entry = tree[name]
        if not isinstance(entry, dict):
            entry = {"keys": entry}
        holder = _holder(str(name), slot, entry, f"{path}: {name}")
        for digest in _digests(entry.get("keys"), f"{path}: {name}"):
            if holders.setdefault(digest, holder) is not holder:
                raise BadInput(f"{path}: {name} and {holders[digest].name} have one key; each needs its own")
    return holders


def _holder(name: str, slot: int, entry: Mapping[object, object], where: str) -> Holder:
    unknown = [key for key in entry if key not in _KEYS]
    if unknown:
        raise BadInput(f"{where}: unknown key {str(unknown[0])[:40]!r}; known keys: {', '.join(_KEYS)}")
    rate, models = entry.get("requests_per_minute"), entry.get("models")
    if rate is not None and (type(rate) is not int or rate < 1):
        raise BadInput(f"{where}: requests_per_minute: {rate!r:.40} is not a whole number from 1 up")
    if models is None:
        return Holder(name, slot, rate)
    if not (isinstance(models, list) and all(isinstance(model, str) for model in models)):
        raise BadInput(f"{where}: models: {models!r:.40} is not a list of model names")
    return Holder(name, slot, rate, frozenset(models))


def _digests(listed: object, where: str) -> list[bytes]:
    digests = []
    for text in listed if isinstance(listed, list) else [listed]:
        try:
            digest = bytes.fromhex(text if isinstance(text, str) else "")
        except ValueError:
            digest = b""
        if len(digest) != 32:
            raise BadInput(f"{where}: not the SHA-256 of a key (64 hex digits in quotes)")
        digests.append(digest)
    return digests
