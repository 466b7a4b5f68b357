"""The traffic split: which version gets which share of requests, in one JSON file replaced atomically.

Guarantees: a reader sees a whole split or an error, never half; a writer cannot put an older split over a newer one;
the weights of a model sum to 100; who is the canary's follows from a secret of the rollout (the salt), so that nobody
can choose a name for its side; raising the canary's weight only ever adds keys to the canary. Standard library only,
because the on-call commands write it with the host down. Not covered: the journal, which alone hands out terms.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mansard.canonical import canonical_json, write_atomically
from mansard.errors import BadInput, Conflict, Corrupt, MansardError

FORMAT = 1
BUCKETS_PER_PERCENT = 100
NUM_BUCKETS = 100 * BUCKETS_PER_PERCENT
PLACE_BYTES = 6
_SALT = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class VersionSplit:
    """One resident version. `endpoint` (http://127.0.0.1:PORT) is None while no engine holds the version."""

    weight_percent: int
    endpoint: str | None
    served_name: str


@dataclass(frozen=True, slots=True)
class ModelSplit:
    """One model's versions. Only stable and canary have weight; the others are resident for testers and rollback.

    `name` is the key of the model in the file. `stable` is who serves as stable; where the journal's stable has no
    engine, `stands_in_for` names that one and `stable` is the version that serves its users meanwhile.
    `salt` is the secret of the running rollout.
    """

    name: str
    stable: int
    canary: int | None
    lease_counter: int
    versions: Mapping[int, VersionSplit]
    stands_in_for: int | None = None
    salt: str = field(default="", repr=False)

    @property
    def journal_stable(self) -> int:
        """The stable version by the journal."""
        return self.stable if self.stands_in_for is None else self.stands_in_for

    @property
    def canary_percent(self) -> int:
        return 0 if self.canary is None else self.versions[self.canary].weight_percent


@dataclass(frozen=True, slots=True)
class Split:
    """The whole file. Term 0 without models is the split before the first release."""

    term: int = 0
    models: Mapping[str, ModelSplit] = field(default_factory=dict)


def key_digest(model: str, sticky_key: str) -> int:
    """64 bits for a key: the same in every process and on every day, others for another model."""
    digest = hashlib.blake2b(f"{model}\0{sticky_key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def new_salt() -> str:
    """For a rollout: its own, so that other users are the canary's in each."""
    return secrets.token_hex(16)


def bucket_of(digest: int, salt: str) -> int:
    """The place of a key in [0, NUM_BUCKETS), where HAProxy computes the same (infra/haproxy/haproxy.cfg)."""
    place = hashlib.sha256(f"{salt}/{digest}".encode()).digest()[:PLACE_BYTES]
    return int.from_bytes(place, "big") % NUM_BUCKETS


def choose(model_split: ModelSplit, digest: int) -> int:
    """The version that serves the key of a digest. The canary takes the lowest buckets: a higher weight only adds."""
    if model_split.canary is None:
        return model_split.stable
    is_canary = bucket_of(digest, model_split.salt) < model_split.canary_percent * BUCKETS_PER_PERCENT
    return model_split.canary if is_canary else model_split.stable


def is_newer_or_same(split: Split, known: Split) -> bool:
    """Whether a reader that holds `known` may take `split`: a higher term, or the same with no lease counter lower."""
    if split.term != known.term:
        return split.term > known.term
    return all(
        name in split.models and split.models[name].lease_counter >= model.lease_counter
        for name, model in known.models.items()
    )


def with_stable(split: Split, model: str, version: int, endpoint: str | None, served_name: str, term: int) -> Split:
    """`version` takes all traffic. A canary is gone (kept only if it is `version`); the old stable stays resident."""
    known = split.models.get(model)
    others = {} if known is None else {n: v for n, v in known.versions.items() if n != known.canary}
    versions = {n: dataclasses.replace(v, weight_percent=0) for n, v in others.items() if n != version}
    versions[version] = VersionSplit(100, endpoint, served_name)
    counter = 0 if known is None else known.lease_counter
    return _replace(split, ModelSplit(model, version, None, counter, versions), term)


def with_canary(
    split: Split,
    model: str,
    version: int,
    endpoint: str,
    served_name: str,
    weight_percent: int,
    term: int,
    salt: str = "",
) -> Split:
    """`version` is the canary at `weight_percent`, stable has the rest. BadInput without a stable, or for stable.

    `salt` is the rollout's; without it sides can be computed by anybody.
    """
    known = _model(split, model)
    if version in (known.stable, known.stands_in_for):
        raise BadInput(f"{model} version {version} is stable; a canary is another version")
    if not 0 <= weight_percent <= 100:
        raise BadInput(f"weight_percent {weight_percent} of {model} version {version}: 0 to 100 is expected")
    versions = {
        n: dataclasses.replace(v, weight_percent=100 - weight_percent if n == known.stable else 0)
        for n, v in known.versions.items()
        if n != known.canary
    }
    versions[version] = VersionSplit(weight_percent, endpoint, served_name)
    return _replace(split, dataclasses.replace(known, canary=version, versions=versions, salt=salt), term)


def without_canary(split: Split, model: str, term: int) -> Split:
    """Stable, or who stands in for it, takes all traffic and the canary is no longer resident. Without a canary only
    the term changes."""
    known = _model(split, model)
    stable = known.versions[known.stable]
    after = with_stable(split, model, known.stable, stable.endpoint, stable.served_name, term)
    return _replace(after, dataclasses.replace(after.models[model], stands_in_for=known.stands_in_for), term)


def with_stand_in(split: Split, model: str, version: int, endpoint: str | None, served_name: str) -> Split:
    """`version` serves what stable has to serve, until it is called with the journal's stable itself. The canary keeps
    its share. The term stays (no pointer moved); the lease is renewed."""
    before = _model(split, model)
    if version == before.canary:
        raise BadInput(f"{model} version {version} is the canary and cannot stand in for stable")
    versions = {
        n: dataclasses.replace(v, weight_percent=v.weight_percent if n == before.canary else 0)
        for n, v in before.versions.items()
    }
    versions[version] = VersionSplit(100 - before.canary_percent, endpoint, served_name)
    stands_in_for = None if version == before.journal_stable else before.journal_stable
    after = dataclasses.replace(before, stable=version, versions=versions, stands_in_for=stands_in_for)
    return renewed(_replace(split, after, split.term), model)


def with_endpoint(split: Split, model: str, version: int, endpoint: str | None, served_name: str) -> Split:
    """A version became resident, moved, or lost its engine. The term stays (no pointer moved); the lease is renewed."""
    known = _model(split, model)
    weight = known.versions[version].weight_percent if version in known.versions else 0
    versions = {**known.versions, version: VersionSplit(weight, endpoint, served_name)}
    return renewed(_replace(split, dataclasses.replace(known, versions=versions), split.term), model)


def without_version(split: Split, model: str, version: int) -> Split:
    """A version left the rollback window. BadInput for one that has a role. The term stays; the lease is renewed."""
    known = _model(split, model)
    if version in (known.stable, known.canary, known.stands_in_for):
        raise BadInput(f"{model} version {version} is stable or canary and cannot leave the split")
    versions = {n: v for n, v in known.versions.items() if n != version}
    return renewed(_replace(split, dataclasses.replace(known, versions=versions), split.term), model)


def renewed(split: Split, model: str) -> Split:
    """The same split with a higher lease counter: the controller lives."""
    known = _model(split, model)
    return _replace(split, dataclasses.replace(known, lease_counter=known.lease_counter + 1), split.term)


def read_split(path: Path) -> Split:
    """The split on disk; the empty one where there is no file yet.

    Raises Corrupt for a half-written or damaged file, BadInput for another format.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Split()
    return parse_split(data, str(path))


def parse_split(data: bytes, where: str) -> Split:
    """A split from the file's bytes; `where` names it in messages. Raises as `read_split`."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors
        raise Corrupt(f"{where}: {len(data)} bytes that are not a whole JSON document: {error}") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
        raise BadInput(f"{where}: format {found!r} of a traffic split; this code reads format {FORMAT}")
    try:
        split = Split(_whole(tree["term"]), {name: _parse_model(name, m) for name, m in tree["models"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(f"{where}: not a traffic split: {type(error).__name__}: {error}") from error
    check_split(split, where)
    return split


def check_split(split: Split, where: str) -> None:
    """Raises Corrupt unless every model's stable and canary are there, differ, and alone share the weight of 100."""
    for name, model in split.models.items():
        roles = {model.stable} | ({model.canary} if model.canary is not None else set())
        if model.stands_in_for in roles:
            raise Corrupt(f"{where}: {name}: version {model.stands_in_for} is stands_in_for and has a role of its own")
        if model.canary == model.stable or not roles <= model.versions.keys() or name != model.name:
            raise Corrupt(
                f"{where}: {name}: stable {model.stable} and canary {model.canary} must be two versions of it"
            )
        weights = {n: v.weight_percent for n, v in model.versions.items()}
        idle = [n for n, weight in weights.items() if weight and n not in roles]
        if sum(weights.values()) != 100 or min(weights.values()) < 0 or idle:
            raise Corrupt(f"{where}: {name}: weights {weights} must sum to 100 over stable and canary alone")


def split_bytes(split: Split) -> bytes:
    """The file's bytes."""
    models = {
        name: {
            "stable": model.stable,
            "canary": model.canary,
            "lease_counter": model.lease_counter,
            "versions": {str(number): dataclasses.asdict(version) for number, version in model.versions.items()},
            **({} if model.stands_in_for is None else {"stands_in_for": model.stands_in_for}),
            **({"salt": model.salt} if model.salt else {}),
        }
        for name, model in split.models.items()
    }
    return canonical_json({"format": FORMAT, "term": split.term, "models": models}) + b"\n"


def write_split(path: Path, split: Split) -> None:
    """Replace the file and read it back. Raises Conflict when the one on disk is newer.

    A higher term replaces a lower one; within a term, only a split that is the same or has a higher lease counter
    somewhere (and none lower). A damaged file is replaced: the journal, not this file, is the truth.
    """
    check_split(split, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _writers_lock(path):
        try:
            known = read_split(path)
        except Corrupt:
            known = Split()
        _refuse_older(path, split, known)
        write_atomically(path, split_bytes(split))
        if read_split(path) != split:
            raise MansardError(f"{path}: read back another split than the one written; who else writes this file?")


def _refuse_older(path: Path, split: Split, known: Split) -> None:
    if split == known:
        return
    has_moved = split.term > known.term or any(
        name not in known.models or model.lease_counter > known.models[name].lease_counter
        for name, model in split.models.items()
    )
    if not is_newer_or_same(split, known) or not has_moved:
        raise Conflict(
            f"{path}: term {split.term} is not newer than term {known.term} on disk; read it again and decide anew"
        )


@contextlib.contextmanager
def _writers_lock(path: Path) -> Iterator[None]:
    """One writer at a time between the read of the old term and the rename."""
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _model(split: Split, model: str) -> ModelSplit:
    if model not in split.models:
        raise BadInput(f"model {model!r} has no stable version in the traffic split of term {split.term}")
    return split.models[model]


def _replace(split: Split, model: ModelSplit, term: int) -> Split:
    return Split(term, {**split.models, model.name: model})


def _parse_model(name: str, tree: Mapping[str, Any]) -> ModelSplit:
    if not (name.isascii() and name.isprintable()):
        raise ValueError(f"model name {name!r} is not plain text")
    canary, stands_in_for = tree["canary"], tree.get("stands_in_for")
    return ModelSplit(
        name=name,
        stable=_whole(tree["stable"]),
        canary=None if canary is None else _whole(canary),
        lease_counter=_whole(tree["lease_counter"]),
        versions={int(number): _parse_version(version) for number, version in tree["versions"].items()},
        stands_in_for=None if stands_in_for is None else _whole(stands_in_for),
        salt=_salt(tree.get("salt", "")),
    )


def _salt(value: object) -> str:
    if not (isinstance(value, str) and (not value or _SALT.fullmatch(value))):
        raise ValueError("salt is not 32 hex digits")
    return value


def _parse_version(tree: Mapping[str, Any]) -> VersionSplit:
    endpoint, served_name = tree["endpoint"], tree["served_name"]
    if endpoint is not None and not _is_endpoint(endpoint):
        raise ValueError(f"endpoint {endpoint!r} is not http://HOST:PORT")
    if not isinstance(served_name, str):
        raise TypeError(f"served_name {served_name!r} is not a string")
    return VersionSplit(_whole(tree["weight_percent"]), endpoint, served_name)


def _is_endpoint(value: object) -> bool:
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
        return parts.scheme == "http" and bool(parts.hostname) and bool(parts.port)
    except ValueError:  # a port that is none, an address with half its brackets
        return False


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not a whole number")
    return value
