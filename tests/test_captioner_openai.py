"""The client of OpenAI-compatible servers against a local one that answers, stalls, breaks off and refuses."""

import base64
import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from llava_next_captioner import Answer, CaptionerError, OpenAIEngine, Request, openai_engine

SECRET = "sk-very-secret-0123"
GOOD = ({"choices": [{"message": {"content": " A b. "}, "finish_reason": "stop"}], "usage": {"completion_tokens": 7}},)


class Server(ThreadingHTTPServer):
    """Answers each request by the next step of the script of its prompt, and keeps what it was sent.

    A step is (document, bytes or a list of either, status, headers, seconds before each).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scripts: dict[str, list[tuple]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.lock, self.running, self.most = threading.Lock(), 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.paths.append(self.path)
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
            script = self.server.scripts.get(body["messages"][0]["content"][1]["text"], [])
            step: Any = script.pop(0) if script else GOOD
        self.answer(*step)

    do_GET = do_POST

    def answer(self, document: Any, status: int = 200, headers: dict[str, str] | None = None, wait: float = 0) -> None:
        parts = document if isinstance(document, list) else [document]
        parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in parts]
        try:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(parts[0]))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            for number, part in enumerate(parts):
                time.sleep(wait)
                with self.server.lock:
                    self.server.running -= number == 0
                self.wfile.write(part)
        except OSError:
            pass  # the client has gone

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(openai_engine, "FIRST_WAIT", 0.01)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def request(name: str, prefix: str = "") -> Request:
    return Request(f"{name}.png", Image.new("RGB", (6, 4), (200, 30, 30)), name, prefix)


def ask(server: Server, *names: str, attempts: int = 1, **settings) -> list[Answer]:
    engine = OpenAIEngine(server.url, "m", **{"timeout": 2} | settings)
    return engine.prepare([request(name) for name in names]).sample(
        [(index, attempt) for index in range(len(names)) for attempt in range(attempts)]
    )


def test_what_is_sent(server: Server) -> None:
    engine = OpenAIEngine(server.url + "/", "m", seed=3, max_new_tokens=9, top_k=None)
    assert (
        engine.prepare([request("a"), request("b", "A b")]).sample([(0, 0), (0, 1), (1, 0)])
        == [Answer("A b.", 7, True)] * 3
    )
    assert set(server.paths) == {"/v1/chat/completions"}
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
    bodies = sorted(server.bodies, key=lambda body: (len(body["messages"]), body["seed"]))
    plain, forced = bodies[0], bodies[2]
    url = plain["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    assert image.size == (6, 4) and abs(image.getpixel((3, 2))[0] - 200) < 8  # pyright: ignore
    assert (plain["model"], plain["max_tokens"], plain["temperature"], plain["top_p"]) == ("m", 9, 0.8, 0.9)
    assert "top_k" not in plain and "continue_final_message" not in plain
    assert forced["messages"][1] == {"role": "assistant", "content": "A b"} and forced["continue_final_message"]
    assert len({body["seed"] for body in bodies}) == 3

    first = {body["seed"] for body in bodies}
    server.bodies.clear()
    engine.prepare([request("b")]).sample([(0, 0)])
    assert {body["seed"] for body in server.bodies} < first


@pytest.mark.parametrize(
    "failure",
    [
        ({"error": "slow down"}, 429, {"Retry-After": "0.05"}),
        ({"error": "slow down"}, 429, {"Retry-After": "Thu, 26 Nov 2020 10:00:00 GMT"}),
        (b"oops", 500),
        ({}, 503, {"Retry-After": "soon"}),
        (b"<html>", 200),
        ({"choices": []}, 200),
        ({"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]}, 200),
        (b'{"choices": [', 200, {"Content-Length": "400"}),
        (b"xyz", 200, {"Content-Length": "3", "Transfer-Encoding": "chunked"}),
        (GOOD[0], 200, {}, 0.7),
    ],
)
def test_passing_failures_are_tried_again(server: Server, failure: tuple) -> None:
    server.scripts["a"] = [failure, failure, GOOD]
    assert ask(server, "a", timeout=0.3) == [Answer("A b.", 7, True)]
    assert len(server.bodies) == 3 and server.bodies[0] == server.bodies[2]  # the seed among them

    server.scripts["a"] = [failure] * 3
    with pytest.raises(CaptionerError, match=r"a\.png: ") as error:
        ask(server, "a", retries=1, timeout=0.3)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert len(server.bodies) == 5


def test_waits_double_or_are_as_long_as_asked(server: Server) -> None:
    waits: list[float | None] = []

    class Hasty(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return self.is_set()

    server.scripts["a"] = [({}, 500)] * 3 + [({}, 429, {"Retry-After": "7"}), ({}, 429, {"Retry-After": "9999"})]
    engine = OpenAIEngine(server.url, "m")
    assert engine._ask(request("a"), "data:", 0, Hasty()) == Answer("A b.", 7, True)
    assert waits == [0.01, 0.02, 0.04, 7, openai_engine.LONGEST_RETRY_AFTER]


def test_a_byte_now_and_then_does_not_hold_the_run(server: Server) -> None:
    server.scripts["a"] = [([b" "] * 30, 200, {"Content-Length": "30"}, 0.1)]
    started = time.monotonic()
    with pytest.raises(CaptionerError, match=r"no answer within 0\.3 s"):
        ask(server, "a", timeout=0.3, retries=0)
    assert time.monotonic() - started < 2


def test_the_key_is_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []
    for step in [
        ({"error": f"wrong key {SECRET}"}, 401),
        ({"error": f"{SECRET} may not"}, 403),
        ({"error": f"bad {SECRET}"}, 400),
        ({"error": f"none such {SECRET}"}, 404),
        ({"error": f"broken by {SECRET}"}, 500),
        (f"no json {SECRET}".encode(), 200),
        (("x" * 190 + SECRET).encode(), 200),  # across the place where the message ends
        (b"", 302, {"Location": server.url + "/elsewhere"}),
    ]:
        server.scripts["a"] = [step] * 2
        with pytest.raises(CaptionerError) as error:
            ask(server, "a", retries=1)
        shown.append(str(error.value))
    assert "refuses access (HTTP 401): set OPENAI_API_KEY" in shown[0]
    assert "none such ***" in shown[3] and "points elsewhere (HTTP 302)" in shown[7]
    assert "/v1/elsewhere" not in server.paths

    for bad in (SECRET + "\n" + SECRET, SECRET + "\u00fc"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(CaptionerError, match="no key has") as error:
            ask(server, "a")
        shown.append(str(error.value))
    engine = OpenAIEngine(server.url, "m")
    assert SECRET[:8] not in "".join(shown) + caplog.text + repr(engine) + str(vars(engine))
    assert not any("\n" in message for message in shown)

    monkeypatch.delenv("OPENAI_API_KEY")
    server.scripts.clear()
    ask(server, "a")
    assert "Authorization" not in server.headers[-1]


def test_an_image_that_is_refused_does_not_end_the_run(server: Server, caplog) -> None:
    engine = OpenAIEngine(server.url, "m", concurrency=1)
    chunk = engine.prepare([request("a"), request("big")])
    server.scripts["big"] = [({"error": "too large"}, 413)] * 2
    with pytest.raises(CaptionerError, match=r"big\.png: .* HTTP 413: .*too large"):
        chunk.sample([(1, 0)])  # nothing has worked yet: the fault may lie in all requests
    assert chunk.sample([(0, 0), (1, 0)]) == [Answer("A b.", 7, True), Answer("", 0, False)]
    assert "big.png" in caplog.text and "413" in caplog.text


def test_cut_answers_and_prefixes(server: Server) -> None:
    server.scripts["a"] = [({"choices": [{"message": {"content": None}, "finish_reason": "length"}], "usage": None},)]
    assert ask(server, "a") == [Answer("", 0, False)]
    for content in ("A chest shows", " shows"):
        server.scripts["a"] = [({"choices": [{"message": {"content": content}, "finish_reason": "length"}]},)]
        chunk = OpenAIEngine(server.url, "m").prepare([request("a", "A chest")])
        assert chunk.sample([(0, 0)]) == [Answer("A chest shows", 0, False)]


def test_concurrency_is_bounded_and_order_kept(server: Server) -> None:
    names = [f"n{index}" for index in range(8)]
    for name in names:
        said = {"choices": [{"message": {"content": name}, "finish_reason": "stop"}]}
        server.scripts[name] = [(said, 200, {}, 0.05)]
    assert [answer.text for answer in ask(server, *names, concurrency=3)] == names
    assert 1 < server.most <= 3


def test_addresses_and_settings_are_checked(server: Server) -> None:
    for address, message in [
        ("localhost:8000", "must look like"),
        ("ftp://host/v1", "must look like"),
        (f"http://me:{SECRET}@host/v1", "no user"),
        (f"http://host/v1?key={SECRET}", "no user"),
    ]:
        with pytest.raises(CaptionerError, match=message) as error:
            OpenAIEngine(address, "m")
        assert SECRET not in str(error.value)
    with pytest.raises(CaptionerError, match="concurrency"):
        OpenAIEngine(server.url, "m", concurrency=0)
    port = server.server_address[1]
    server.server_close()
    with pytest.raises(CaptionerError, match="cannot be reached") as error:
        engine = OpenAIEngine(f"http://127.0.0.1:{port}/v1", "m", retries=1)
        engine.prepare([request("a")]).sample([(0, 0)])
    assert "\n" not in str(error.value)
