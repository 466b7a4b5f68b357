"""The rules on one request's head, without a server."""

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mansard.serving.router.policy import (
    ALLOWED,
    Refused,
    check_path,
    engine_request,
    model_named,
    pinned_version,
    sticky_key,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(), st.sampled_from(["GET", "POST", "PUT", "CONNECT", ""]))
def test_only_listed_paths_pass_and_only_with_their_method(target: str, method: str) -> None:
    try:
        path = check_path(method, target)
    except Refused as refused:
        assert refused.status in (404, 405)
    else:
        assert ALLOWED[path] == method
        assert target.startswith(path)


def test_a_query_goes_no_further() -> None:
    assert check_path("POST", "/v1/completions?api-version=1") == "/v1/completions"


def test_what_ties_a_user_is_the_session_then_the_user_then_the_tenant_then_the_address() -> None:
    session, user = {"x-mansard-session": "s", "x-user-id": "u"}, {"x-user-id": "u"}
    senders = ((session, b'{"user": "b"}'), (user, b'{"user": "b"}'), ({}, b'{"user": "b"}'), ({}, b"{}"))
    keys = [sticky_key(tenant, headers, body, "10.0.0.1") for tenant in (None, "acme") for headers, body in senders]
    assert len(set(keys)) == len(keys)
    assert sticky_key(None, session, b"", "10.0.0.2") == keys[0]
    assert sticky_key("acme", {}, b"", "10.0.0.2") == keys[7]
    assert sticky_key("other", user, b"", "10.0.0.1") != keys[5]
    assert sticky_key(None, {}, b"", "10.0.0.2") != keys[3]


def test_a_user_is_the_same_in_the_header_and_in_the_body() -> None:
    assert sticky_key("acme", {}, b'{"user": "u"}', "x") == sticky_key("acme", {"x-user-id": "u"}, b"", "y")


@pytest.mark.parametrize("text", ["", "v1", "-1", "1.0", " 1", "٣", "1" * 10])
def test_a_pin_that_is_no_version_number_is_refused(text: str) -> None:
    with pytest.raises(Refused) as caught:
        pinned_version({"x-mansard-version": text})
    assert caught.value.status == 400


def test_the_only_model_is_found_without_a_look_at_the_body() -> None:
    assert asyncio.run(model_named(["tiny"], b"\xff not JSON")) == "tiny"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary())
def test_among_several_models_a_body_names_one_or_is_refused(body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        asyncio.run(model_named(["one", "two"], body))
    assert caught.value.status in (400, 404)


def test_a_deeply_nested_body_is_refused() -> None:
    with pytest.raises(Refused):
        asyncio.run(model_named(["one", "two"], b"[" * 1_000_000))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.from_regex(rb"[a-zA-Z-]{1,12}", fullmatch=True), st.binary(max_size=30)), max_size=6),
    st.binary(max_size=50),
)
def test_an_engine_sees_one_request_with_one_length(headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    try:
        payload = engine_request("/v1/completions", "POST", [*headers, (b"Content-Length", b"7")], body)
    except Refused as refused:
        assert refused.status == 400
        return
    head, _, sent = payload.partition(b"\r\n\r\n")
    names = [line.partition(b":")[0] for line in head.split(b"\r\n")[1:]]
    assert sent == body
    assert names.count(b"content-length") == 1
    assert not {b"authorization", b"transfer-encoding", b"connection", b"expect", b"cookie"} & set(names)


@pytest.mark.parametrize("value", [b"a\r\nx: y", b"a\nb", b"a\rb", b"a\0b"])
def test_control_characters_in_a_header_are_refused(value: bytes) -> None:
    with pytest.raises(Refused, match="control character"):
        engine_request("/v1/completions", "POST", [(b"x", value)], b"")


def test_headers_that_connection_lists_stay_here() -> None:
    headers = [(b"Connection", b"close, X-Private"), (b"X-Private", b"1"), (b"X-Other", b"2")]
    assert engine_request("/p", "POST", headers, b"").split(b"\r\n")[2:-2] == [b"x-other: 2", b"content-length: 0"]
