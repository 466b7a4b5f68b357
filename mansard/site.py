"""The site: *where* things are (stores, ports, interpreters, people). Never hashed into a recipe.

Read with PyYAML and the standard library only, because the on-call commands read it too. Unknown keys, wrong types and
missing files are refused with file, key, value and what would be right. Relative paths are relative to the site file.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mansard.canonical import sha256_json
from mansard.errors import BadInput
from mansard.site_checks import check
from mansard.site_sections import (
    ApprovalPolicy,
    EngineSite,
    Environment,
    InferenceNode,
    Person,
    Ports,
    RouterSite,
    Schedule,
    TrainingSite,
)
from mansard.strict_records import read


@dataclass(frozen=True, slots=True)
class Site:
    """One place where Mansard runs. Build it with `load_site`."""

    path: Path
    home: Path
    data: Path
    models: tuple[str, ...]
    environments: dict[str, Environment]
    stages: dict[str, str]
    ports: Ports = field(default_factory=Ports)
    engine: EngineSite = field(default_factory=EngineSite)
    training: TrainingSite = field(default_factory=TrainingSite)
    people: dict[str, Person] = field(default_factory=dict)
    router: RouterSite = field(default_factory=RouterSite)
    approval: ApprovalPolicy = field(default_factory=ApprovalPolicy)
    api_keys: Path | None = None
    operator_tokens: Path | None = None
    authentication: str = "password"
    rollback_window: int = 2
    when_stable_is_dead: str = "previous"
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
    check(site)
    return site
