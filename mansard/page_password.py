"""The password of Prefect's and MLflow's pages and APIs: one file under the site's home, made by `mansard up`.

Guarantees: 256 random bits in a file of mode 600 in a folder of mode 700; a file that other users may read is refused.
Standard library only, because `mansard verify` asks MLflow without loading it.
"""

import base64
import contextlib
import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from mansard.errors import BadInput

if TYPE_CHECKING:
    from mansard.site import Site

USER = "mansard"


def password_file(site: "Site") -> Path:
    return site.home / "private" / "pages.password"


def create_password(site: "Site") -> bool:
    """Make the file unless it is there; whether it was made. Safe to race. BadInput when others may read it."""
    file = password_file(site)
    if site.authentication == "none" or read_password(site) is not None:
        return False
    file.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    file.parent.chmod(0o700)
    beside = file.with_suffix(f".{os.getpid()}")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    try:
        os.link(beside, file)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
    return True


def read_password(site: "Site") -> str | None:
    """None before the first `mansard up`, and where the site turns authentication off. BadInput for an unsafe file."""
    if site.authentication == "none":
        return None
    file = password_file(site)
    try:
        with file.open() as stream:
            state = os.fstat(stream.fileno())
            text = stream.read().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: cannot read the pages' password: {error}") from error
    if state.st_mode & 0o077 or state.st_uid != os.geteuid():
        mode = stat.S_IMODE(state.st_mode)
        raise BadInput(
            f"{file}: the pages' password is not private (mode {mode:o}, owner {state.st_uid}); "
            "delete the file, and mansard up makes a new password"
        )
    if len(text) < 32 or not text.isalnum():
        raise BadInput(f"{file}: no password of the pages ({len(text)} characters); delete it and run mansard up")
    return text


def login(site: "Site") -> str | None:
    """USER:PASSWORD, or None."""
    password = read_password(site)
    return None if password is None else f"{USER}:{password}"


def authorization(site: "Site") -> dict[str, str]:
    """The header that a request to Prefect or MLflow needs."""
    pair = login(site)
    return {} if pair is None else {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def fingerprint(site: "Site") -> str:
    """Changes with the password; tells nothing about it, which has 256 bits."""
    pair = login(site)
    return "none" if pair is None else hashlib.sha256(pair.encode()).hexdigest()[:16]


def login_text(site: "Site") -> str:
    """How a person opens the pages."""
    if site.authentication == "none":
        return (
            f"authentication: off (authentication: none in {site.path}); every user of this machine may read and "
            "change Prefect and MLflow"
        )
    return f"user {USER}, password in {password_file(site)}"
