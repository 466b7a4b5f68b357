"""The store by hand: take, bring back, check."""

import argparse
import json
from pathlib import Path

from mansard.errors import BadInput, Corrupt
from mansard.release.journal import Journal
from mansard.site import Site, find_site, load_site
from mansard.store import Store


def snapshot(args: argparse.Namespace) -> int:
    """Take a folder; the id is the digest of its content, so the same folder twice is one snapshot."""
    store = _store(args)
    folder = Path(args.folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: not a folder; name the folder that holds the files to take")
    taken = store.snapshot(folder)
    files = store.manifest(taken).files
    size = sum(f.size_bytes for f in files.values())
    facts = {"snapshot": taken, "files": len(files), "bytes": size}
    _tell(args, facts, f"{taken}\nnext: mansard restore {taken[:12]} DIR")
    return 0


def restore(args: argparse.Namespace) -> int:
    """Bring a snapshot back into an empty or new folder, byte for byte."""
    store = _store(args)
    found = store.resolve(args.snapshot)
    store.restore(found, Path(args.folder))
    _tell(args, {"snapshot": found, "folder": args.folder}, f"{found[:12]} is in {args.folder}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Read every byte of one snapshot, of all, or every entry of the journal."""
    site = load_site(find_site(args.site))
    if args.journal:
        with Journal.open(site.journal) as journal:
            journal.verify()
            count = len(journal.entries())
        _tell(args, {"entries": count}, f"journal: {count} entries, the chain is whole")
        return 0
    store = Store(site.store)
    damages = store.verify(store.resolve(args.snapshot) if args.snapshot else None)
    if damages:
        more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
        raise Corrupt(f"{damages[0]}{more}")
    _tell(args, {"damages": []}, "every byte is as it was taken")
    return 0


def _store(args: argparse.Namespace) -> Store:
    site: Site = load_site(find_site(args.site))
    return Store(site.store)


def _tell(args: argparse.Namespace, facts: dict[str, object], text: str) -> None:
    print(json.dumps({"format": 1, **facts}) if args.json else text)
