"""Whether a version that a rollback goes back to is whole, and who signed it.

A store in a folder is asked before the move, and damage stops one that is not `hard`. A bucket may hang while users
wait, so it is asked after the move, for LATER_SECONDS at most, and whatever it says is a warning. Standard library only
until an artifact is looked at, which loads BLAKE3.
"""

import threading

from mansard.errors import Corrupt, MansardError
from mansard.release.events import APPROVED
from mansard.release.journal import Journal
from mansard.site import Site

LATER_SECONDS = 2.0


def target_warnings(site: Site, journal: Journal, model: str, version: int, hard: bool) -> list[str]:
    """Check a version before moving to it: the manifest's digest and every object's size (`mansard verify` reads
    bytes). Never approvals; only who signed and is gone is reported.

    Raises Corrupt for damaged or missing content; with `hard` that is a warning too.
    """
    entry = journal.evidence(model, version)
    artifact = str(entry.body["registration"]["artifact"])
    is_changed = entry.digest != entry.computed_digest()
    trouble = f"journal entry {entry.sequence} was changed" if is_changed else ""
    warnings = artifact_warnings(site, model, version, artifact, hard, trouble)
    approved = [e for e in journal.entries(model, kinds=(APPROVED,)) if e.version == version]
    signers = {entry.body["registration"]["author"]: "author", **({approved[-1].who: "reviewer"} if approved else {})}
    for name, role in signers.items():
        if name not in site.people or role not in site.people[name].roles:
            warnings.append(f"version {version}: {name}, its {role}, has that role in {site.path.name} no more")
        elif site.people[name].revoked:
            why = site.people[name].revoked
            warnings.append(f"version {version}: the key of {name}, its {role}, is revoked: {why}")
    return warnings


def artifact_warnings(
    site: Site, model: str, version: int, artifact: str, hard: bool, trouble: str = ""
) -> list[str]:
    """Before the move. `trouble` is what is known to be wrong already. Corrupt as `target_warnings`."""
    try:
        if trouble:
            raise Corrupt(trouble)
        if site.store_url is None:
            _check_whole(site, artifact)
    except Corrupt as error:
        if not hard:
            raise Corrupt(f"{model} version {version}: {error}; --to another version, or --hard") from error
        return [f"version {version}: {error}"]
    return []


def later_warnings(site: Site, version: int, artifact: str) -> list[str]:
    """After the move: what a bucket says, or that it said nothing in time. A store in a folder was asked before."""
    if site.store_url is None:
        return []
    answers: list[str] = []
    looking = threading.Thread(target=_look, args=(site, artifact, answers), daemon=True)
    looking.start()
    looking.join(LATER_SECONDS)
    silence = f"{site.store_url}: no answer in {LATER_SECONDS:g} s, so its artifact was not checked"
    return [f"version {version}: {problem}" for problem in (answers or [silence]) if problem]


def _look(site: Site, artifact: str, answers: list[str]) -> None:
    """Adds what is wrong with it, or nothing; a look that failed in another way adds no answer."""
    try:
        _check_whole(site, artifact)
        answers.append("")
    except MansardError as error:
        answers.append(str(error))


def _check_whole(site: Site, artifact: str) -> None:
    from mansard.store.store import Store  # BLAKE3 is loaded only where evidence is read

    if not Store.of(site).holds(artifact):
        raise Corrupt(f"its artifact {artifact[:12]} is not whole in {site.store_url or site.store}")
