"""The site says in how many processes a training runs; the recipe does not know."""

from pathlib import Path

import pytest
import yaml

from mansard.errors import BadInput
from mansard.site import Site, load_site
from tasks.training import ranks_of

ROOT = Path(__file__).resolve().parents[2]


def site_with(tmp_path: Path, training: dict[str, object]) -> Site:
    tree = yaml.safe_load((ROOT / "configs/site/local.yaml").read_text()) | {"training": training}
    (path := tmp_path / "site.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_site(path)


def test_one_process_needs_nothing_and_several_a_configuration(tmp_path: Path) -> None:
    assert ranks_of(site_with(tmp_path, {})) == {}
    config = str(ROOT / "configs/deepspeed/zero2.json")
    told = ranks_of(site_with(tmp_path, {"processes": 4, "deepspeed": config, "launcher": ["torchrun", "--nnodes=2"]}))
    assert told["ranks"]["processes"] == 4
    assert told["ranks"]["config"]["zero_optimization"]["stage"] == 2
    assert told["ranks"]["launcher"] == ["torchrun", "--nnodes=2"]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_shipped_configurations_are_of_their_level(tmp_path: Path, level: int) -> None:
    config = str(ROOT / f"configs/deepspeed/zero{level}.json")
    told = ranks_of(site_with(tmp_path, {"processes": 2, "deepspeed": config}))
    assert told["ranks"]["config"]["zero_optimization"]["stage"] == level


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"processes": 0}, r"training\.processes: 0 is not a number from 1 up"),
        ({"processes": 2}, r"training\.deepspeed: 2 processes need a DeepSpeed configuration"),
        ({"processes": 2, "deepspeed": "nowhere.json"}, r"nowhere\.json: not a DeepSpeed configuration"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, training: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ranks_of(site_with(tmp_path, training))
