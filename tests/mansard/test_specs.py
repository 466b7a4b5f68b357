"""A wrong key, unit or file fails at once, naming file, key, value and what would be right."""

from pathlib import Path

import pytest
import yaml

from mansard.errors import BadInput
from mansard.site import load_site
from mansard.spec_files import load_spec
from mansard.specs.whole import UpgradeSpec

ROOT = Path(__file__).resolve().parents[2]
UPGRADE = (ROOT / "configs/upgrade/demo.yaml").read_text()
SITE = (ROOT / "configs/site/local.yaml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_sequences", "batch_sequence", "unknown key 'train.batch_sequence'; did you mean 'batch_sequences'?"),
        ("blocks: 4", "blocks: 0", "expand.blocks: 0: Input should be greater than 0"),
        ("positions: even", "positions: [0, 1, 1, 2]", "names a block twice"),
        ("positions: even", "positions: [0, 1]", "positions lists 2 blocks, but blocks is 4"),
        ("positions: even", "positions: [0, 1, 2, -1]", "Input should be greater than or equal to 0"),
        ("positions: even", "positions: evn", "expand.positions: 'evn': Input should be 'even', 'upper-half' or"),
        ("tokens: 256, seed: 0}", "tokens: 1, seed: 0}", "expand.probe.tokens: 1: Input should be greater than 1"),
        ("method: residual", "method: mean", "fuse.method: 'mean': Input should be 'residual' or 'average'"),
        ("method: residual", "weight: 0.5", "fuse: weight 0.5 goes with method: average; residual has none"),
        ("method: residual", "method: average, weight: 0", "fuse.weight: 0: Input should be greater than 0"),
        ("method: residual", "method: average, weight: 1.5", "fuse.weight: 1.5: Input should be less than"),
        ("  frozen: bf16", "  frozen: fp8", "train: frozen: fp8 needs precision: bf16, not fp32"),
        ("  frozen: bf16  ", "  frozen: null", "new_blocks: bf16 needs frozen: bf16: what never moves is"),
        ("master: fp32", "master: stochastic_rounding", "master: stochastic_rounding needs precision: bf16, not fp32"),
        ("micro_batch_sequences: null", "micro_batch_sequences: 3", "batch_sequences 4 is no multiple of"),
        ("memory_gib: null", "memory_gib: 0", "train.memory_gib: 0: Input should be greater than 0"),
        ("tokens: 400000", "tokens: many", "train.tokens: 'many': Input should be a valid integer"),
        ("min_domain_fraction: 0.3", "min_domain_fraction: 0.6", "the mixture holds 0.50 domain data"),
        ("  version: 1   ", "  path: x\n  version: 1 ", "name exactly one of path, hub, version"),
        ("source: docstrings", "source: poems", "quantize.source 'poems' is not one of data.sources"),
        ("  source: docstrings", "  # source", "quantize: awq calibrates on text; name one of data.sources as source"),
        ("scheme: awq", "scheme: W4A16_ASYM", "quantize.scheme: 'W4A16_ASYM': a preset's name no longer stands for"),
        ("scheme: awq", "scheme: none", "scheme: none takes no other key (group_size, sample_tokens, samples, source"),
        ("group_size: 128", "group_size: 48", "quantize.group_size: 48: Input should be 32, 64 or 128"),
        ("symmetric: false", "symmetric: maybe", "quantize.symmetric: 'maybe': Input should be a valid boolean"),
        ("  version: 1   ", "  version: 1\n  ignore_config_keys: [a] ", "ignore_config_keys goes with path or hub"),
        ("format: 1", "format: 2", "format: 2: Input should be 1"),
    ],
)
def test_wrong_spec_is_refused_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in UPGRADE
    path = tmp_path / "spec.yaml"
    path.write_text(UPGRADE.replace(old, new, 1))
    with pytest.raises(BadInput) as refused:
        load_spec(UpgradeSpec, path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_quantization_is_one_key_and_is_hashed_as_one(tmp_path: Path) -> None:
    tree = yaml.safe_load(UPGRADE)
    path = tmp_path / "spec.yaml"
    digests = set()
    for quantize in ({"scheme": "none"}, {"source": "code"}, {"source": "code", "group_size": 64},
                     {"source": "code", "symmetric": True}):  # fmt: skip
        path.write_text(yaml.safe_dump({**tree, "quantize": quantize}))
        spec = load_spec(UpgradeSpec, path)
        digests.add(spec.digest())
        assert type(spec.quantize).model_validate(spec.quantize.model_dump(mode="json")) == spec.quantize
        assert (spec.quantize.model_dump(mode="json") == {"scheme": "none"}) == (spec.quantize.scheme == "none")
    assert len(digests) == 4


def test_placement_by_importance_asks_for_general_text(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(UPGRADE.replace("positions: even", "positions: importance"))
    assert load_spec(UpgradeSpec, path).expand.positions == "importance"
    path.write_text(path.read_text().replace("is_domain: false", "is_domain: true"))
    with pytest.raises(BadInput, match=r"add to data\.sources one with is_domain: false, or take even"):
        load_spec(UpgradeSpec, path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rollback_window", "rollback_windows", "unknown key 'rollback_windows'; did you mean 'rollback_window'?"),
        ("prefect: 4200", "prefect: '4200'", "ports: prefect: '4200' is not of type int"),
        ("default: main", "default: mian", "environment 'mian' is not one of: main, serve"),
        ("roles: [author", "roles: [writer", "'writer' is not one of author, reviewer, operator"),
        ("format: 1", "format: 9", "format: 1 is expected"),
    ],
)
def test_wrong_site_is_refused_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SITE
    path = tmp_path / "site.yaml"
    path.write_text(SITE.replace(old, new, 1))
    with pytest.raises(BadInput) as refused:
        load_site(path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_same_meaning_has_the_same_digest_and_another_value_another(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("# a comment\n" + UPGRADE)
    same = load_spec(UpgradeSpec, path).digest()
    path.write_text(UPGRADE.replace("blocks: 4", "blocks: 3"))
    assert same == load_spec(UpgradeSpec, ROOT / "configs/upgrade/demo.yaml").digest()
    assert same != load_spec(UpgradeSpec, path).digest()


def test_a_site_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot read the site file"):
        load_site(path)
