"""`mansard up` and `mansard down`."""

import argparse
import json

from flows import stack
from flows.screen import show
from mansard.page_password import login_text
from mansard.site import find_site, load_site


def up(args: argparse.Namespace) -> int:
    """Start what is not running and print where to look."""
    site = load_site(find_site(args.site))
    urls = stack.up(site)
    if args.json:
        print(json.dumps({"format": 1, "urls": urls}))
        return 0
    for name, url in urls.items():
        show(f"{name:8} {url}")
    show(f"pages: {login_text(site)}")
    show("next: mansard status")
    return 0


def down(args: argparse.Namespace) -> int:
    """Stop the stack; engines end with their host."""
    stack.down(load_site(find_site(args.site)))
    if args.json:
        print(json.dumps({"format": 1, "running": []}))
    return 0
