"""The program of `make bench NAME=efficacy` on a base of a few thousand parameters: how it chooses, how it counts, and
(`make campaigns`) that every way of learning runs. What it finds is not looked at: nothing is learned in a step."""

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mansard.demo.base import train_tokenizer
from mansard.models.loading import load_tokenizer
from mansard.training.data import Packed, pack_texts

METHODS = ("llama_pro", "ours", "less_replay", "lora", "existing_blocks", "full_tuning")
ROW_TOKENS = 32


@pytest.fixture
def efficacy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("efficacy")


def ground_of(work: Path) -> Any:
    """A base of two blocks and two texts; one step an upgrade."""
    from efficacy_ground import SMALL, Ground, pretrain

    shape = {"vocabulary": 300, "hidden": 32, "intermediate": 64, "blocks": 2, "heads": 2, "max_tokens": ROW_TOKENS}
    sizes = {"new_blocks": 1, "sequence": ROW_TOKENS, "batch": 2, "base_batch": 2, "held_out_rows": 2}
    tokens = {"tokens": 2 * ROW_TOKENS, "base_tokens": 4 * ROW_TOKENS}
    scale = replace(SMALL, shape=shape, **sizes, **tokens)
    texts = {n: [f"{n} {i}: " + " ".join(f"{n}{(i * 7 + j) % 23}" for j in range(40)) for i in range(12)]
             for n in ("general", "domain")}  # fmt: skip
    train_tokenizer(texts["general"], shape["vocabulary"], ROW_TOKENS).save_pretrained(work / "base")
    tokenizer = load_tokenizer(work / "base")
    packed = {name: pack_texts(name, found, tokenizer, ROW_TOKENS, 0) for name, found in texts.items()}
    ground = Ground(scale, work, work / "base", packed, packed, torch.device("cpu"))
    pretrain(ground, tokenizer)
    return ground


def trainings_on(folder: Path, ground: Any = None) -> Any:
    from efficacy_ground import on_this_machine
    from side_by_side import Trainings, stand_on

    if ground is not None:
        stand_on(folder, lambda: ground)
    return Trainings(folder, on_this_machine)


def choose(efficacy: ModuleType, trainings: Any) -> dict[str, Any]:
    return {method: efficacy.Search(trainings, {}).settings(method) for method in METHODS}


@pytest.mark.campaign  # some thirty trainings, side by side; the ways' own tests always run
def test_every_way_runs_from_choice_to_table(efficacy: ModuleType, tmp_path: Path) -> None:
    ground = ground_of(tmp_path)
    base, done = ground.base_bits(), trainings_on(tmp_path, ground)
    chosen, runs = efficacy.run_all(done, {})
    ours = chosen["ours"]
    assert set(chosen) == set(METHODS) and (ours["anchor"], ours["share"]) in efficacy.HELD
    assert chosen["less_replay"] == chosen["llama_pro"] | {"share": ours["share"]}
    found = efficacy.summary(base, runs)
    assert set(found["methods"]) == set(METHODS)
    assert all(run["seconds"] > 0 for of_seeds in runs.values() for run in of_seeds)
    counts = {method: row["parameters"] for method, row in found["methods"].items()}
    assert counts["llama_pro"] == counts["ours"] == counts["existing_blocks"] < counts["full_tuning"]
    assert counts["lora"] == pytest.approx(counts["ours"], rel=0.2)
    again = trainings_on(tmp_path)
    (tmp_path / "ground.pt").unlink()
    assert efficacy.run_all(again, {}) == (chosen, runs), "what is done is not done again"
    given = {method: chosen[method] for method in ("llama_pro", "ours", "full_tuning")}
    some = trainings_on(tmp_path)
    some.runs = {name: run for name, run in some.runs.items() if not name.startswith("pilot")}
    assert efficacy.run_all(some, given) == (given, {method: runs[method] for method in given})
    assert not [name for name in some.runs if name.startswith("pilot")], "nothing is searched"


def test_settings_are_chosen_by_text_that_is_not_reported(efficacy: ModuleType, tmp_path: Path) -> None:
    ground = ground_of(tmp_path)
    few = {str(count): replace_rows(ground.held_out["domain"], count) for count in (5, 3, 1)}
    ground = replace(ground, held_out=ground.held_out | few)
    for name, count in (("domain", 2), ("5", 2), ("3", 1)):
        reported, chosen_by = ground.rows(name, False), ground.rows(name, True)
        assert len(reported) == len(chosen_by) == count and not set(reported) & set(chosen_by)
    with pytest.raises(SystemExit, match="1 held-out rows, 2 are needed at the least"):
        ground.rows("1", False)
    ground = replace(ground, held_out={"domain": few["5"], "general": few["5"]})
    settings = {"rate": 1e-9}
    pilots = efficacy.train(ground, "full_tuning", settings, efficacy.PILOT)
    first = efficacy.train(ground, "full_tuning", settings, efficacy.SEEDS[0])
    assert pilots["domain"] != pytest.approx(first["domain"], rel=1e-6), "of other rows"


def replace_rows(text: Packed, count: int) -> Packed:
    return replace(text, tokens_RT=text.tokens_RT[:count], positions_RT=text.positions_RT[:count])


@pytest.mark.parametrize(("best", "found"), [(3e-3, 3e-3), (4e-2, 4e-2), (1e-4, 1e-3), (10.0, 8e-2)])
def test_a_best_rate_at_the_upper_edge_is_looked_beyond(efficacy: ModuleType, best: float, found: float) -> None:
    tried: list[float] = []

    def score(rate: float) -> float:
        tried.append(rate)
        return abs(math.log(rate / best))

    assert efficacy.best_rate((1e-3, 3e-3, 1e-2), score) == pytest.approx(found)
    assert len(tried) == len(set(tried)) <= efficacy.MOST_RATES


def finished(efficacy: ModuleType, file: Path, general_of_ours: float) -> Any:
    """All runs of the pilot seed, as if they had been made: the second rate is best, `importance` the best place, and
    ours is the better on the domain the weaker its anchor."""
    runs: dict[str, Any] = {"importance": {"blocks": [1]}}
    for method, rates in efficacy.RATES.items():
        more = "/even/0.0" if method == "llama_pro" else ""
        for rate, domain in zip(rates, (1.2, 1.0, 1.1), strict=True):
            runs[f"pilot/{method}/{rate}{more}"] = {"domain": domain, "general": 2.0}
    plain = efficacy.RATES["llama_pro"][1]
    for place, domain in (("even", 1.0), ("upper-half", 0.9), ([1], 0.8)):
        runs[f"pilot/ours/{plain}/{place}/0.0"] = {"domain": domain, "general": 2.0}
    for anchor, share in efficacy.HELD:
        general = general_of_ours if anchor < 1.0 else 2.0
        domain = 0.5 + 0.1 * anchor - 0.01 * share
        runs[f"pilot/ours/{plain}/[1]/{anchor}/{share}"] = {"domain": domain, "general": general}
    file.write_text(json.dumps(runs))
    return trainings_on(file.parent)


@pytest.mark.parametrize(("general_of_ours", "held"), [(1.9, (0.3, 0.8)), (2.0, (0.3, 0.8)), (2.1, (1.0, 0.8))])
def test_ours_is_the_best_on_the_domain_among_those_that_keep_what_plain_keeps(
    efficacy: ModuleType, tmp_path: Path, general_of_ours: float, held: tuple[float, float]
) -> None:
    chosen = choose(efficacy, finished(efficacy, tmp_path / "runs.json", general_of_ours))
    rates = {method: chosen[method]["rate"] for method in efficacy.RATES}
    assert rates == {method: of_method[1] for method, of_method in efficacy.RATES.items()}
    anchor, share = held
    assert chosen["ours"] == {"rate": rates["llama_pro"], "positions": [1], "anchor": anchor, "share": share}


def test_the_table_pairs_seeds_and_says_how_sure_it_is(efficacy: ModuleType) -> None:
    assert efficacy.interval([1.0, 2.0, 3.0]) == [2.0, pytest.approx(4.3027 / 3**0.5, abs=1e-5)]
    base = {"domain": 2.0, "general": 1.0}
    cost = {"seconds": 1.0, "peak_gib": None, "parameters": 7}

    def of(domain: float, general: float) -> list[dict[str, Any]]:
        return [{"domain": domain + noise, "general": general, **cost} for noise in (0.0, 0.1, 0.2)]

    runs = {method: of(1.5, 1.1) for method in METHODS} | {"ours": of(1.4, 1.05), "full_tuning": of(1.2, 1.3)}
    found = efficacy.summary(base, runs)
    assert found["methods"]["ours"]["domain_gain"][0] == pytest.approx(0.5)
    assert found["methods"]["ours"]["general_loss"] == [pytest.approx(0.05), pytest.approx(0.0)]
    assert found["domain_of_ours_less_llama_pro"] == [pytest.approx(-0.1), pytest.approx(0.0)], "seed by seed"
    assert found["forgetting_full_over_ours"] == pytest.approx(6.0)
    harmless = {**runs, "ours": of(1.4, 0.9)}
    assert efficacy.summary(base, harmless)["forgetting_full_over_ours"] is None
