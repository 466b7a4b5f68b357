"""Key files and the rates of their holders, without a server."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mansard.errors import BadInput
from mansard.serving.router.keys import Holder, KeyFile, parse_holders
from mansard.serving.router.policy import Refused
from mansard.serving.router.rates import BURST_SECONDS, Rates, shared_memory


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys_are_read_again_only_when_the_file_changes_and_bad_ones_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f'{{"acme": "{digest_of("k1")}"}}')
    keys = KeyFile(path)
    keys.read()
    assert keys.holder(bearer("k1")).name == "acme"
    bad = (
        *(("acme: 12", "SHA-256"), ("[a]", "mapping"), ("a: [", "cannot read"), ("a: abcd", "SHA-256")),
        *(("[" * 20_000, "cannot read"), ("a: {keys: [], rate: 5}", "unknown key 'rate'; known keys: keys")),
        (f'a: {{keys: "{digest_of("x")}", requests_per_minute: 0}}', "whole number from 1 up"),
        (f'a: {{keys: "{digest_of("x")}", models: demo}}', "list of model names"),
        (f'a: "{digest_of("x")}"\nb: "{digest_of("x")}"', "a and b|b and a"),
    )
    for text, words in bad:
        path.write_text(text)
        with pytest.raises(BadInput, match=words):
            keys.read()
        assert keys.holder(bearer("k1")).name == "acme"
    path.unlink()
    with pytest.raises(BadInput, match="cannot read"):
        keys.read()


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", "Bearer k2", "Basic k1", "Bearer k1 k1", "k1"])
def test_any_other_authorization_is_401(tmp_path: Path, value: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f'acme: "{digest_of("k1")}"')
    keys = KeyFile(path)
    keys.read()
    with pytest.raises(Refused) as caught:
        keys.holder({"authorization": value})
    assert caught.value.status == 401
    assert "k1" not in str(caught.value)


def test_another_tenants_model_does_not_exist() -> None:
    tree = {"acme": {"keys": digest_of("k1"), "models": ["demo"]}, "beta": digest_of("k2")}
    acme, beta = sorted(parse_holders(tree, Path("keys")).values(), key=lambda holder: holder.name)
    acme.check_model("demo")
    beta.check_model("other")
    with pytest.raises(Refused) as caught:
        acme.check_model("other")
    assert caught.value.status == 404


@settings(deadline=None)
@given(
    rate=st.integers(1, 600),
    gaps=st.lists(st.floats(0, 30), max_size=60),
)
def test_whenever_requests_come_no_minute_passes_more_than_the_rate_and_the_burst(rate: int, gaps: list[float]) -> None:
    descriptor = shared_memory()
    rates, holder, now, passed = Rates(descriptor), Holder("acme", 3, rate), 5.0, []
    os.close(descriptor)
    for gap in [0.0, *gaps]:
        now += gap
        try:
            rates.check(holder, now)
        except Refused as refused:
            assert refused.status == 429
            assert refused.retry_after_seconds is not None
            rates.check(holder, now + refused.retry_after_seconds)  # what it says is true
            passed.append(now + refused.retry_after_seconds)
            now += refused.retry_after_seconds
        else:
            passed.append(now)
    burst = max(rate * BURST_SECONDS / 60, 1)
    for start in passed:
        assert sum(start <= moment < start + 60 for moment in passed) <= rate + burst + 1e-6


def test_workers_share_one_rate_and_tenants_do_not() -> None:
    descriptor = shared_memory()
    one, two = Rates(descriptor), Rates(descriptor)
    os.close(descriptor)
    one.check(Holder("acme", 0, 1), 100.0)
    with pytest.raises(Refused):
        two.check(Holder("acme", 0, 1), 101.0)
    two.check(Holder("beta", 1, 1), 101.0)
    two.check(Holder("free", 2), 101.0)


def test_a_number_left_by_another_boot_holds_nobody_up() -> None:
    descriptor = shared_memory()
    rates = Rates(descriptor)
    os.close(descriptor)
    rates.check(Holder("acme", 0, 60), 1e9)
    rates.check(Holder("acme", 0, 60), 10.0)
