"""States of prompts wait at the plugin's port until each is taken, once, and never hold more than they may."""

import http.client
import threading

from mansard_vllm.held import Held, States, serve

HOST = "127.0.0.1"


def states(size: int) -> States:
    return States(bytes(range(256)) * size, "bfloat16", (size, 128))


def ask(port: int, path: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(HOST, port)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read(), dict(response.headers)
    finally:
        connection.close()


def test_what_waits_is_handed_out_once_with_its_shape() -> None:
    held = Held(10_000)
    port = serve(held, HOST, 18300)
    held.put("a", states(3))
    status, data, headers = ask(port, "/states/a")
    assert (status, data) == (200, states(3).data)
    assert (headers["X-States-Dtype"], headers["X-States-Shape"]) == ("bfloat16", "3,128")
    assert ask(port, "/states/a")[0] == ask(port, "/states/b")[0] == ask(port, "/")[0] == 404


def test_engines_of_one_machine_take_ports_of_their_own() -> None:
    one, other = Held(1000), Held(1000)
    ports = [serve(one, HOST, 18300), serve(other, HOST, 18300)]
    other.put("k", states(1))
    assert [ask(port, "/states/k")[0] for port in ports] == [404, 200]


def test_what_waits_longest_goes_where_room_is_short() -> None:
    held = Held(700)
    for key in ("a", "b", "c"):
        held.put(key, states(1))  # 256 bytes each
    assert held.take("a") is None
    held.put("large", states(9))
    assert held.take("b") is held.take("c") is None
    assert held.take("large") == states(9)
    held.put("d", states(2))
    assert held.take("d") == states(2)


def test_a_prompt_that_was_computed_again_takes_no_second_room() -> None:
    held = Held(700)
    for _ in range(9):
        held.put("a", states(1))
    held.put("b", states(1))
    assert held.take("a") == held.take("b") == states(1)


def test_room_is_given_back_whoever_takes_and_puts_at_once() -> None:
    held = Held(256 * 64)

    def put_and_take(name: str) -> None:
        for number in range(50):
            held.put(f"{name}{number}", states(1))
            assert held.take(f"{name}{number}") == states(1)

    threads = [threading.Thread(target=put_and_take, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(64):
        held.put(str(number), states(1))
    assert all(held.take(str(number)) == states(1) for number in range(64))
