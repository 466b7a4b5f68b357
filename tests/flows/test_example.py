"""The example's parts that need neither servers nor a GPU: material, sampling, the table, the shipped specs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flows.example import EXAMPLES, Timeline, parsed, summary_of
from flows.example_material import fetch, prepare
from flows.gpu_use import GpuUse, Sample, gpu_use, stage_rows
from mansard.errors import BadInput, MansardError
from mansard.site import load_site
from mansard.spec_files import load_spec, load_suites
from mansard.specs.whole import AdoptSpec, UpgradeSpec
from mansard.store.store import Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("form", ["small", "full"])
def test_the_shipped_specs_load_and_both_forms_judge_on_the_same_suites(form: str) -> None:
    folder = EXAMPLES / "smollm2"
    suites = []
    for kind, verb in ((AdoptSpec, "adopt"), (UpgradeSpec, "upgrade")):
        path = folder / f"{verb}-{form}.yaml"
        spec = load_spec(kind, path)
        suites.append([s.name for s in load_suites(spec, path)])
        assert spec.quantize.group_size == 64
    assert suites[0] == suites[1] == ["german-bits", "english-bits"]
    assert load_site(folder / "site.yaml").models == load_site(folder / "site-gpu.yaml").models == ("smollm2",)


def test_prepared_material_is_copied_once(tmp_path: Path) -> None:
    for name in ("m", "t"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    prepare(tmp_path / "data", tmp_path / "m", tmp_path / "t")
    (tmp_path / "m/file").write_text("changed")
    prepare(tmp_path / "data", tmp_path / "m", tmp_path / "t")
    assert (tmp_path / "data/model/file").read_text() == "m" and (tmp_path / "data/text/file").read_text() == "t"
    with pytest.raises(BadInput, match=r"--model-folder: not a folder"):
        prepare(tmp_path / "other", tmp_path / "nowhere", tmp_path / "t")
    assert not (tmp_path / "other/model").exists()


def test_a_package_that_cannot_be_had_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(MansardError, match=r"libreoffice-help-de is not installed and cannot be fetched") as no:
        fetch("libreoffice-help-de", tmp_path / "debian")
    assert "apt-get install libreoffice-help-de libreoffice-help-en-us" in str(no.value)
    assert "--text-folder DIR" in str(no.value) and "\n" not in str(no.value)


def program(folder: Path, text: str) -> None:
    """An nvidia-smi of two cards."""
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!{sys.executable}\n{text}")
    (folder / "nvidia-smi").chmod(0o755)


def test_gpus_are_sampled_while_the_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "0, 0, 1024\\n1, 50, 1024\\n0, 100, 2048\\n1, 0, 3072\\nnonsense\\n0, 0, 0\\n"
    program(tmp_path / "bin", f"import time\nprint('{lines}', end='', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    begin = time.time()
    with gpu_use() as use:
        deadline = time.monotonic() + 60
        while len(use.samples) < 2:
            assert time.monotonic() < deadline, use
    assert [(s.percent, s.gib) for s in use.samples] == [(50.0, 2.0), (100.0, 5.0)]
    assert use.between(begin, time.time()) == {"gpu_mean_percent": 75.0, "gpu_idle_share": 0.0, "gpu_gib": 5.0}
    monkeypatch.setenv("PATH", str(tmp_path))
    with gpu_use() as use:
        pass
    assert use.samples == [] and use.between(0, begin) == {}


def test_the_table_tells_what_lies_between_stages() -> None:
    use = GpuUse([Sample(float(t), 100.0 if 12 <= t < 20 else 0.0, 1.0) for t in range(10, 40)])
    stages: list[dict[str, Any]] = [
        {"name": "train", "begin": 12.0, "seconds": 8.0},
        {"name": "fuse", "begin": 20.5, "seconds": 2.0},
    ]
    rows = stage_rows("upgrade", 10.0, 40.0, stages, use)
    assert [(r["name"], r["seconds"], r["gpu_mean_percent"]) for r in rows] == [
        ("upgrade: before train", 2.0, 0.0),
        ("upgrade: train", 8.0, 100.0),
        ("upgrade: fuse", 2.0, 0.0),
        ("upgrade: after the last stage", 17.5, 0.0),
        ("upgrade", 30.0, 26.7),
    ]


def test_a_second_run_has_no_stage_in_its_table(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    snapshot = store.put_files({"a": b"a"})
    begin = time.time()
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begin))
    store.remember("a" * 64, snapshot, {"stage": "fuse", "begun_at": at, "seconds": 0.5})
    stage = {"name": "fuse", "snapshot": snapshot, "reused": False}
    first, again = Timeline(store, GpuUse()), Timeline(store, GpuUse())
    first.add("upgrade", begin, [stage])
    again.add("upgrade", begin, [{**stage, "reused": True}])
    assert [r["name"] for r in first.rows] == ["upgrade: fuse", "upgrade"]
    assert [r["name"] for r in again.rows] == ["upgrade"]


def test_the_summary_holds_target_and_guards() -> None:
    suite = {"suite": "german-bits", "role": "target", "before": 2.0, "after": 1.5, "interval": [-1, 0]}
    guard = {**suite, "suite": "english-bits", "role": "guard", "verdict": "pass"}
    made = summary_of({"verdict": "pass", "suites": [suite, guard]})
    assert (made["verdict"], made["target_before"], made["target_after"]) == ("pass", 2.0, 1.5)
    assert [g["suite"] for g in made["guards"]] == ["english-bits"]
    json.dumps(made)


def test_an_unknown_example_is_refused_with_the_names() -> None:
    done = subprocess.run([sys.executable, "-m", "flows.example", "gpt"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "smollm2" in done.stderr
    assert parsed(["smollm2", "--full"]).full
