"""What is made of an engine's own account of itself."""

import pytest

from mansard.serving.engine.metrics import (
    HUNG_SECONDS,
    Account,
    in_flight,
    means_since,
    means_text,
    parse_metrics,
)

TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo"} 2.0
vllm:num_requests_running{engine="1",model_name="demo"} 1.0
vllm:num_requests_waiting{engine="0",model_name="demo"} 4.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{engine="0",model_name="demo"} 100.0
vllm:generation_tokens_created{engine="0",model_name="demo"} 1.76e+09
vllm:prompt_tokens_total{engine="0",model_name="demo"} 50.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="demo"} 0.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="demo"} 10.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="demo"} 10.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="demo"} 2.5
process_open_fds 42.0
"""
"""Lines of vLLM 0.32's (2026-11-26)."""


def metrics(tokens: float, running: float = 1.0) -> dict[str, float]:
    return {"vllm:generation_tokens_total": tokens, "vllm:num_requests_running": running}


def test_vllms_text_is_read_over_all_its_engines() -> None:
    found = parse_metrics(TEXT)
    assert in_flight(found) == 7
    assert means_since({}, found) == {"first_token": 0.25}
    assert found["vllm:generation_tokens_total"] == 100


@pytest.mark.parametrize("text", ["", "<html>", '{"error": 1}', "vllm:num_requests_running{ nothing", "\x00"])
def test_another_text_says_nothing(text: str) -> None:
    assert parse_metrics(text) == {}
    assert in_flight({}) is None


def test_means_are_of_what_came_since_and_a_restarted_engine_counts_from_zero() -> None:
    name = "vllm:e2e_request_latency_seconds"
    before = {f"{name}_sum": 100.0, f"{name}_count": 10.0}
    assert means_since(before, {f"{name}_sum": 101.0, f"{name}_count": 12.0}) == {"request": 0.5}
    assert means_since(before, before) == {}
    assert means_since(before, {f"{name}_sum": 3.0, f"{name}_count": 2.0}) == {"request": 1.5}


def test_means_are_told_beside_each_other() -> None:
    text = means_text({"first_token": 0.25, "output": 12.0}, {"first_token": 0.2})
    assert text == "the engines' own means: first_token 0.25 s (stable 0.2), output 12 tokens"
    assert means_text({}, {"first_token": 0.2}) == ""


def told(*answers: dict[str, float] | None, num_waiting: int = 0, seconds: float = HUNG_SECONDS / 3) -> Account:
    account = Account()
    for answer in answers:
        account.take(answer, num_waiting, seconds)
    return account


def test_an_engine_that_moves_nothing_while_somebody_waits_hangs() -> None:
    assert not told(*[metrics(7)] * 3).is_hung
    assert told(*[metrics(7)] * 4).is_hung
    assert told(metrics(7), None, None, None).is_hung  # it does not even answer
    assert told(*[metrics(7, running=0)] * 4, num_waiting=1).is_hung  # it stopped before it told of them
    assert not told(metrics(7), metrics(7), metrics(7), metrics(8)).is_hung
    assert not told(metrics(7), metrics(7), metrics(7), metrics(7), metrics(7), metrics(8)).is_hung


def test_an_idle_engine_does_not_hang_and_one_of_another_kind_is_not_judged() -> None:
    assert not told(*[metrics(7, running=0)] * 9).is_hung
    assert not told(*[{}] * 9, num_waiting=3).is_hung
    assert not told(*[None] * 9, num_waiting=3).is_hung
