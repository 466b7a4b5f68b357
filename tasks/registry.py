"""MLflow's registered versions, tags and aliases as the journal says they should be: plan (pure), then apply.

The journal allocates version numbers; MLflow counts on its own, so each of its versions carries ours as the tag
`mansard_version`. Aliases are stable, canary and previous. Only the mirror (mirror.py) calls this. Tags and aliases of
other names are left alone. Not covered: deleting a version (the journal never does).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mansard.errors import Corrupt
from mansard.records import Registration, SnapshotId
from mansard.release.journal import Journal
from mansard.release.tip import Tip, parse_tip
from tasks import tracking
from tasks.signed_tip import TAG

ALIASES = ("stable", "canary", "previous")
STATES = {
    "approved": "approved",
    "rejected": "rejected",
    "rollout_started": "canary",
    "promoted": "promoted",
    "aborted": "aborted",
    "rolled_back": "rolled back",
}
"""What the newest entry of a kind makes of a version."""


@dataclass(frozen=True, slots=True)
class Listed:
    """How a model name stands, by the journal or by MLflow: tags of each version, and alias -> version (both ours)."""

    versions: Mapping[int, Mapping[str, str]]
    aliases: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Change:
    """One call to MLflow. `create` and `tag` give `tags`; `point` and `unpoint` an `alias`."""

    verb: str
    version: int
    tags: tuple[tuple[str, str], ...] = ()
    alias: str = ""


def wanted(journal: Journal, model: str) -> Listed:
    """What MLflow should list, read from the journal."""
    versions: dict[int, dict[str, str]] = {}
    for entry in journal.entries(model):
        if entry.version is None:
            continue
        if "registration" in entry.body:
            found = Registration.from_json(entry.body["registration"])
            versions.setdefault(entry.version, {"mansard_state": "registered"}).update(_facts(found, entry.version))
        if entry.kind in STATES:
            tags = versions.setdefault(entry.version, {})
            tags["mansard_state"] = STATES[entry.kind]
            if entry.kind in ("approved", "rejected"):
                tags["mansard_decision"] = f"{entry.kind} by {entry.who} at {entry.at}: {entry.why}"[:4000]
    for tags in versions.values():
        base = versions.get(int(tags.get("mansard_base_version") or 0), {})
        tags["mansard_base"] = base.get("mansard_model", "")
    pointers = journal.pointers(model)
    places = {"stable": pointers.stable, "canary": pointers.canary, "previous": pointers.previous}
    return Listed(versions, {alias: version for alias, version in places.items() if version is not None})


def listed(client: MlflowClient, model: str) -> tuple[Listed, dict[int, str]]:
    """What MLflow lists, and its own number for each of our versions."""
    versions: dict[int, dict[str, str]] = {}
    numbers: dict[int, str] = {}
    for found in client.search_model_versions(f"name = '{model}'"):
        ours = found.tags.get("mansard_version")
        if ours is None:
            continue
        number = int(ours)
        if number not in numbers or int(found.version) < int(numbers[number]):  # the oldest of a doubled one
            numbers[number] = str(found.version)
            versions[number] = {k: v for k, v in found.tags.items() if k.startswith("mansard_")}
    ours_of = {theirs: ours for ours, theirs in numbers.items()}
    aliases = {}
    for alias, theirs in _aliases(client, model).items():
        if alias in ALIASES:
            aliases[alias] = ours_of.get(str(theirs), 0)  # 0: it points at something that is not ours
    return Listed(versions, aliases), numbers


def plan(goal: Listed, found: Listed) -> list[Change]:
    """The changes that make `found` the `goal`: versions first, then aliases."""
    changes = []
    for version, tags in sorted(goal.versions.items()):
        known = found.versions.get(version)
        new = tuple(sorted(item for item in tags.items() if known is None or known.get(item[0]) != item[1]))
        if known is None or new:
            changes.append(Change("create" if known is None else "tag", version, new))
    for alias in ALIASES:
        version_or_none = goal.aliases.get(alias)
        if version_or_none is None and alias in found.aliases:
            changes.append(Change("unpoint", found.aliases[alias], alias=alias))
        elif version_or_none is not None and found.aliases.get(alias) != version_or_none:
            changes.append(Change("point", version_or_none, alias=alias))
    return changes


def apply(
    client: MlflowClient, model: str, changes: Sequence[Change], numbers: Mapping[int, str], store_uri: str
) -> None:
    """Make the changes. Safe to repeat: each is found or set by its own key."""
    numbers = dict(numbers)
    for change in changes:
        if change.verb == "create":
            numbers[change.version] = _create(client, model, dict(change.tags), store_uri)
        elif change.verb == "tag":
            for key, value in change.tags:
                client.set_model_version_tag(model, numbers[change.version], key, value)
        elif change.verb == "point":
            client.set_registered_model_alias(model, change.alias, numbers[change.version])
        else:
            client.delete_registered_model_alias(model, change.alias)


def publish_tip(client: MlflowClient, model: str, tip: Tip) -> None:
    """The journal's signed tip beside the versions. Corrupt where MLflow has a later one: the journal lost entries."""
    try:
        known = client.get_registered_model(model).tags.get(TAG)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return  # nothing of the model is registered yet
        raise
    if known is not None:
        before = parse_tip(known.encode(), f"MLflow's model {model}")
        if before.sequence > tip.sequence:
            raise Corrupt(
                f"MLflow's model {model} has the signed tip of entry {before.sequence} from {before.at}, and the "
                f"host's newest is of entry {tip.sequence}: was the journal cut off? mansard verify --journal"
            )
    if known is None or before.sequence < tip.sequence:
        client.set_registered_model_tag(model, TAG, tip.as_bytes().decode().strip())


def _create(client: MlflowClient, model: str, tags: dict[str, str], store_uri: str) -> str:
    """A registered version of the artifact's logged model; the model name with it where it is the first."""
    try:
        client.create_registered_model(model, tags={"mansard": "true"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    artifact: SnapshotId = tags["mansard_artifact"]
    made = tracking.logged_model(tracking.experiment_of(model), artifact, "artifact", store_uri)
    version = client.create_model_version(
        model,
        source=f"models:/{made.model_id}",
        run_id=made.source_run_id,
        model_id=made.model_id,
        tags=tags,
        await_creation_for=0,
    )
    return str(version.version)


def _facts(registration: Registration, version: int) -> dict[str, str]:
    """A registration as tags."""

    def text(number: int | None) -> str:
        return "" if number is None else str(number)

    return {
        "mansard_version": str(version),
        "mansard_verdict": registration.verdict,
        "mansard_verdict_record": registration.verdict_record,
        "mansard_model": registration.model,
        "mansard_artifact": registration.artifact,
        "mansard_base_version": text(registration.base_version),
        "mansard_baseline_version": text(registration.baseline_version),
        "mansard_anchor_version": text(registration.anchor_version),
        "mansard_author": registration.author,
        "mansard_spec": registration.spec_name,
        "mansard_spec_digest": registration.spec_digest,
    }


def _aliases(client: MlflowClient, model: str) -> dict[str, str]:
    try:
        return dict(client.get_registered_model(model).aliases)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
