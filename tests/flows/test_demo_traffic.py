"""The users of demo and end-to-end test tell a broken stream from one that speaks of errors."""

from flows.demo_traffic import is_whole_stream

TOKEN = 'data: {"choices": [{"text": "error"}]}\n\n'


def test_a_stream_whose_text_is_error_is_whole() -> None:
    assert is_whole_stream(TOKEN + "data: [DONE]\n\n")


def test_a_stream_with_an_error_event_or_without_its_end_is_broken() -> None:
    assert not is_whole_stream(TOKEN + 'data: {"error": {"message": "gone"}}\n\ndata: [DONE]\n\n')
    assert not is_whole_stream(TOKEN)
    assert not is_whole_stream("")
