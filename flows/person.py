"""Who types the command. Standard library only."""

import argparse
import os

from mansard.errors import BadInput


def person(args: argparse.Namespace) -> str:
    """`--as`, else MANSARD_PERSON; BadInput with neither, because decisions are signed by people."""
    name = args.person or os.environ.get("MANSARD_PERSON")
    if not name:
        raise BadInput("who are you? say --as NAME, or set MANSARD_PERSON to your name in the site's people")
    return str(name)
