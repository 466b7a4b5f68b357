"""The site: *where* things are (stores, ports, interpreters, people). Never hashed into a recipe.

Read with PyYAML and the standard library only, because the on-call commands read it too. Unknown keys, wrong types and
missing files are refused with file, key, value and what would be right. Relative paths are relative to the site file.
"""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from mansard.canonical import sha256_json
from mansard.errors import BadInput
from mansard.strict_records import read

ROUTER_PLANES = ("workers", "haproxy")
ROLES = ("author", "reviewer", "operator")
RESERVED_NAMES = ("host",)
"""Not for people: what the journal says where the host itself decided."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Loopback TCP ports. Engines take the first free one from `engines_from` up."""

    prefect: int = 4200
    mlflow: int = 5000
    router: int = 8000
    engines_from: int = 8100


@dataclass(frozen=True, slots=True)
class Environment:
    """An interpreter and the lock file that says which versions it holds."""

    python: Path
    lock: Path
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineSite:
    """How engines run here. `cores` lists one core set per slot, e.g. ["0", "1"]; empty lets vLLM choose.

    `branch_slots`: so many carry-on branches of one base and shape are served by one engine; 0: each by its own.
    """

    environment: str = "serve"
    cores: tuple[str, ...] = ()
    kv_cache_gib: int = 1
    start_timeout_seconds: int = 900
    arguments: tuple[str, ...] = ()
    branch_slots: int = 0


@dataclass(frozen=True, slots=True)
class TrainingSite:
    """Where training runs: in one process, or in `processes` ranks under the DeepSpeed configuration `deepspeed`.

    `launcher` are the words that start the ranks (torchrun's, with nodes and rendezvous; none: torchrun on this
    machine); a rank that says nothing for `hang_seconds` hangs.
    """

    processes: int = 1
    deepspeed: Path | None = None
    launcher: tuple[str, ...] = ()
    hang_seconds: int = 1800


@dataclass(frozen=True, slots=True)
class RouterSite:
    """`plane` is `workers` (Mansard's own, so many processes on one socket) or `haproxy`."""

    plane: str = "workers"
    workers: int = 2


@dataclass(frozen=True, slots=True)
class Person:
    """`public_key` is the key itself (64 hex digits, raw Ed25519) or the path of a file that holds it.

    The key counts from `valid_from` to just before `valid_until`, and never once `revoked` says why it does not.
    """

    roles: tuple[str, ...]
    public_key: str
    valid_from: datetime | None = None
    valid_until: datetime | None = None
    revoked: str = ""


@dataclass(frozen=True, slots=True)
class ApprovalPolicy:
    """So many different reviewers must approve a version, and so long an approval counts."""

    approvals: int = 1
    days: int = 30


@dataclass(frozen=True, slots=True)
class Schedule:
    """A cron line on which the upgrade of `spec` runs, signed by the service key of `author`."""

    name: str
    spec: Path
    cron: str
    author: str


@dataclass(frozen=True, slots=True)
class InferenceNode:
    """A vLLM engine in pooling mode that gives states away for carry-ons: http://HOST:PORT, and its served name."""

    endpoint: str
    served_name: str


@dataclass(frozen=True, slots=True)
class Site:
    """One place where Mansard runs. Build it with `load_site`."""

    path: Path
    home: Path
    data: Path
    models: tuple[str, ...]
    environments: dict[str, Environment]
    stages: dict[str, str]
    ports: Ports = Ports()
    engine: EngineSite = EngineSite()
    training: TrainingSite = TrainingSite()
    people: dict[str, Person] = field(default_factory=dict)
    router: RouterSite = RouterSite()
    approval: ApprovalPolicy = ApprovalPolicy()
    api_keys: Path | None = None
    operator_tokens: Path | None = None
    rollback_window: int = 2
    stage_timeout_seconds: int = 14400
    schedules: tuple[Schedule, ...] = ()
    journal_url: str = field(default="", metadata={"key": "journal"})
    host_public_key: str = ""
    notify: tuple[str, ...] = ()
    store_url: str | None = field(default=None, metadata={"key": "store"})
    """A bucket, s3://BUCKET/PREFIX, where the store's content lasts; without it, it lasts in `store`."""
    nodes: tuple[InferenceNode, ...] = ()

    @property
    def store(self) -> Path:
        """The store's folder; its cache, locks and scratch where the content lasts in a bucket."""
        return self.home / "store"

    @property
    def journal(self) -> Path | str:
        """What Journal.open takes: the URL that the site names, else a file of SQLite."""
        return self.journal_url or self.home / "journal.sqlite3"

    @property
    def store_uri(self) -> str:
        """Where the store's content lasts, as a URI."""
        return self.store_url or self.store.as_uri()

    @property
    def split_file(self) -> Path:
        return self.home / "split.json"

    @property
    def run(self) -> Path:
        """Sockets and pid files."""
        return self.home / "run"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def reports(self) -> Path:
        """A folder a version: its report, page and chart, written again whenever somebody asks for them."""
        return self.home / "reports"

    @property
    def keys(self) -> Path:
        """Where this machine's people keep their private keys: NAME.key, mode 600."""
        return Path(os.environ.get("MANSARD_KEYS", str(self.home / "keys")))

    @property
    def host_socket(self) -> Path:
        return self.run / "host.sock"

    @property
    def tip_file(self) -> Path:
        """The journal's newest entry as the host signed it."""
        return self.home / "tip.json"

    @property
    def memory_file(self) -> Path:
        """What a rollback needs to know while the journal's database is down."""
        return self.home / "memory.json"

    @property
    def emergency_file(self) -> Path:
        """Moves that were made while the journal's database was down, and wait for it."""
        return self.home / "emergency.jsonl"

    @property
    def ballast_file(self) -> Path:
        """Room that a rollback takes when the disk is full."""
        return self.home / "ballast"

    def host_keys(self) -> tuple[Path, Path]:
        """Private and public half of the key that signs tips; the host makes them."""
        return self.home / "host.key", self.home / "host.pub"

    def environment_of(self, stage: str) -> Environment:
        """The environment that runs `stage`."""
        return self.environments[self.stages.get(stage, self.stages["default"])]

    def public_key(self, name: str) -> bytes:
        """The 32 raw bytes of a person's key; BadInput names the person and the file when it cannot be read."""
        text = self.people[name].public_key
        source = text
        if len(text) != 64:
            source = str(self.path.parent / text)
            try:
                text = Path(source).read_text().strip()
            except OSError as error:
                raise BadInput(
                    f"{self.path}: people.{name}.public_key: cannot read {source}: {error.strerror}; "
                    f"make a pair with: mansard keygen {name}"
                ) from error
        try:
            raw = bytes.fromhex(text)
        except ValueError as error:
            raise BadInput(f"{source}: not a public key: 64 hex digits are expected") from error
        if len(raw) != 32:
            raise BadInput(f"{source}: a public key has 32 bytes, this has {len(raw)}")
        return raw

    def people_record(self) -> dict[str, Any]:
        """The people section with the keys resolved, and the approval policy, as JSON: who may do what."""
        people = {
            name: {
                "roles": sorted(person.roles),
                "key": self.public_key(name).hex(),
                "valid_from": person.valid_from and person.valid_from.isoformat(),
                "valid_until": person.valid_until and person.valid_until.isoformat(),
                "revoked": person.revoked,
            }
            for name, person in self.people.items()
        }
        return {"people": people, "approval": dataclasses.asdict(self.approval)}

    def people_digest(self) -> str:
        """Digest of `people_record`; approvals name it."""
        return sha256_json(self.people_record())

    def model_named(self, name: str | None) -> str:
        """`name`, or the site's only model; BadInput when that is not clear."""
        if name is None and len(self.models) == 1:
            return self.models[0]
        if name not in self.models:
            raise BadInput(f"model {name!r}: {self.path} knows {', '.join(self.models)}; say --model NAME")
        return name


def find_site(given: str | None) -> Path:
    """The site file: `--site`, else MANSARD_SITE, else configs/site/local.yaml here or in the checkout."""
    named = given or os.environ.get("MANSARD_SITE")
    if named:
        return Path(named)
    local = Path("configs/site/local.yaml")
    return local if local.exists() else Path(__file__).resolve().parent.parent / local


def load_site(path: Path) -> Site:
    """Read and check a site file."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot read the site file: {error}; name one with --site FILE") from error
    try:
        tree = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - the safe loader
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise BadInput(f"{path}: a site is a mapping of keys, this is {type(tree).__name__}")
    if tree.pop("format", None) != 1:
        raise BadInput(f"{path}: format: 1 is expected as the first key")
    site: Site = read(Site, {**tree, "path": str(path.resolve())}, f"{path}", path.resolve().parent)
    _check(site)
    return site


def _check(site: Site) -> None:
    if "default" not in site.stages:
        raise BadInput(f"{site.path}: stages.default: name the environment that runs stages")
    for stage, name in [*site.stages.items(), ("engine", site.engine.environment)]:
        if name not in site.environments:
            known = ", ".join(site.environments)
            raise BadInput(f"{site.path}: {stage}: environment {name!r} is not one of: {known}")
    if site.training.processes < 1:
        raise BadInput(f"{site.path}: training.processes: {site.training.processes} is not a number from 1 up")
    if site.training.processes > 1 and site.training.deepspeed is None:
        raise BadInput(f"{site.path}: training.deepspeed: {site.training.processes} processes need a DeepSpeed "
                       "configuration, e.g. ../deepspeed/zero2.json")  # fmt: skip
    _check_people(site)
    if site.journal_url:
        _check_journal(site)
    if site.router.plane not in ROUTER_PLANES:
        raise BadInput(f"{site.path}: router.plane: {site.router.plane!r} is not one of {', '.join(ROUTER_PLANES)}")
    if site.engine.branch_slots < 0:
        raise BadInput(f"{site.path}: engine.branch_slots: {site.engine.branch_slots} is not a number from 0 up")
    if site.engine.branch_slots and site.router.plane != "workers":
        raise BadInput(f"{site.path}: engine.branch_slots: {site.router.plane} cannot tell an engine which branch is "
                       "asked; take router.plane workers, or engine.branch_slots 0")  # fmt: skip
    if site.router.workers < 1:
        raise BadInput(f"{site.path}: router.workers: {site.router.workers} is not a number from 1 up")
    if not site.models:
        raise BadInput(f"{site.path}: models: name at least one model")
    if site.store_url is not None and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/[^/\s]+)*/?", site.store_url):
        raise BadInput(f"{site.path}: store: {site.store_url!r} is not of the form s3://BUCKET or s3://BUCKET/PREFIX")


def _check_people(site: Site) -> None:
    for name, person in site.people.items():
        where = f"{site.path}: people.{name}"
        if name in RESERVED_NAMES:
            raise BadInput(f"{where}: the journal names the host so; take another name")
        for role in person.roles:
            if role not in ROLES:
                raise BadInput(f"{where}.roles: {role!r} is not one of {', '.join(ROLES)}")
        begins, ends = person.valid_from, person.valid_until
        if begins is not None and ends is not None and begins >= ends:
            raise BadInput(f"{where}.valid_until: {ends} is not after valid_from {begins}")
    for key in ("approvals", "days"):
        if getattr(site.approval, key) < 1:
            raise BadInput(f"{site.path}: approval.{key}: {getattr(site.approval, key)} is less than 1")


def _check_journal(site: Site) -> None:
    try:
        url = urlsplit(site.journal_url)
        is_known = url.scheme in ("postgresql", "postgres")
    except ValueError:  # a port that is no number, brackets that do not close
        is_known = False
    if not is_known:
        raise BadInput(
            f"{site.path}: journal: {site.journal_url!r} is not postgresql://USER@HOST/DATABASE; "
            "leave the key out for a file of SQLite under home"
        )
    if url.password is not None or "password" in url.query:
        raise BadInput(f"{site.path}: journal: a password in the URL; leave it out and set PGPASSWORD where it runs")
