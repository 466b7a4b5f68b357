"""README, tree and shipped configs say the same thing."""

import re
from pathlib import Path

import pytest

from flows.cli import VERBS, parser
from mansard.site import load_site
from mansard.spec_files import load_spec, load_suites
from mansard.specs.whole import AdoptSpec, CustomizeSpec, UpgradeSpec

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def tree_paths() -> list[str]:
    """Paths named by the README's tree: lines of the fenced block under `## The tree`, two blanks a level."""
    block = README.split("## The tree", 1)[1].split("```")[1]
    paths, stack = [], []
    for line in block.splitlines()[1:]:
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        stack = [*stack[:depth], name.rstrip("/")]
        paths.append("/".join(stack))
    return paths


def test_every_path_in_the_readme_tree_exists() -> None:
    assert [p for p in tree_paths() if not (ROOT / p).exists()] == []


def test_every_top_level_folder_and_package_is_in_the_readme_tree() -> None:
    packages = [p.parent for top in ("mansard", "flows", "tasks") for p in (ROOT / top).rglob("__init__.py")]
    wanted = {str(p.relative_to(ROOT)) for p in packages} | {"configs", "infra", "tests", "pyproject.toml"}
    assert wanted - set(tree_paths()) == set()


def test_every_command_in_the_readme_parses() -> None:
    commands = re.findall(r"^(?:\$ )?\.?(?:\.venv/bin/)?mansard ([a-z].*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        words = [w.strip('"') for w in re.findall(r'"[^"]*"|\S+', command)]
        parser().parse_args(words)


def test_readme_shows_a_real_run() -> None:
    assert "rollback  " in README and "DEMO_OUTPUT" not in README


def test_every_verb_is_in_the_readme() -> None:
    assert [v for v in VERBS if f"mansard {v}" not in README] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs/upgrade").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_upgrade_specs_load(path: Path) -> None:
    assert load_suites(load_spec(UpgradeSpec, path), path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/adopt").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_adopt_specs_load(path: Path) -> None:
    assert load_suites(load_spec(AdoptSpec, path), path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/customize").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_customize_specs_load(path: Path) -> None:
    assert load_suites(load_spec(CustomizeSpec, path), path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/site").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_sites_load(path: Path) -> None:
    assert load_site(path).models


def test_make_names_every_target_of_the_readme() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z][a-z-]*)", README):
        assert re.search(rf"^([a-z -]* )?{target}( [a-z -]*)?:", makefile, flags=re.MULTILINE), target


def test_locks_name_no_package_index() -> None:
    for lock in (ROOT / "infra/constraints").glob("*.txt"):
        for line in lock.read_text().splitlines():
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), f"{lock.name}: {line}"
