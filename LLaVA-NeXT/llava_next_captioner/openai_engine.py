"""Descriptions from any server that speaks OpenAI's chat protocol: vLLM, SGLang, llama.cpp and others.

The key is read from the environment for each request. It is kept nowhere, and taken out of whatever a server says.
"""

import base64
import email.utils
import http.client
import io
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llava_next_captioner.engines import Answer, CaptionerError, Request, stream_seed

KEY = "OPENAI_API_KEY"
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
REFUSED = frozenset({400, 413, 415, 422})  # this request, for what is in it
FIRST_WAIT, LONGEST_WAIT, LONGEST_RETRY_AFTER = 0.5, 30.0, 300.0  # seconds
MAX_REPLY = 4 * 2**20  # bytes
log = logging.getLogger(__name__)


class OpenAIEngine:
    """Captions through the server at `base_url`, such as http://localhost:8000/v1, `concurrency` requests at a time.

    A request that fails for a passing reason is sent again up to `retries` times, with waits that double or that the
    server asks for; `timeout` bounds each try, in seconds. `top_k`, which OpenAI itself does not know, is left out
    where it is None. Raises `CaptionerError` where the server cannot be used. An image that the server refuses, while
    it answers others, gets an empty answer.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        seed: int = 0,
        concurrency: int = 16,
        timeout: float = 120,
        retries: int = 5,
        max_new_tokens: int = 150,
        temperature: float = 0.8,
        top_k: int | None = 50,
        top_p: float = 0.9,
    ):
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CaptionerError("the server's address must look like http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise CaptionerError(f"the server's address must hold no user, password or query: put the key into {KEY}")
        if concurrency < 1 or retries < 0 or timeout <= 0:
            raise CaptionerError("concurrency must be 1 or more, retries 0 or more, the timeout above 0")
        self.model, self.seed, self.concurrency = model, seed, concurrency
        self.address = base_url.rstrip("/") + "/chat/completions"
        self.timeout, self.retries = timeout, retries
        self._settings = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        if top_k is not None:
            self._settings["top_k"] = top_k
        # Following a redirection would carry the key to another address.
        self._opener = urllib.request.build_opener(_NoRedirection)
        self._answered = False

    def prepare(self, requests: Sequence[Request]) -> "OpenAIChunk":
        """Encode the images; nothing is sent before the first `sample`."""
        return OpenAIChunk(self, requests)

    def _body(self, request: Request, image: str, attempt: int) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": request.prompt}]
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        body |= self._settings | {"n": 1, "stream": False, "seed": stream_seed(self.seed, request.name, attempt) >> 32}
        if request.prefix:
            body["messages"].append({"role": "assistant", "content": request.prefix})
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return body

    def _ask(self, request: Request, image: str, attempt: int, halt: threading.Event) -> Answer:
        body = json.dumps(self._body(request, image, attempt)).encode()
        for tries in range(self.retries + 1):
            try:
                answer = _read_answer(self._post(body), request.prefix)
                self._answered = True
                return answer
            except _Failed as failure:
                reason, asked = failure.reason, failure.retry_after
                if failure.refused and self._answered:
                    log.warning("%s: %s", request.name, reason)
                    return Answer("", 0, False)
                if failure.final or tries == self.retries or halt.is_set():
                    raise CaptionerError(f"{request.name}: {reason}") from None
            wait = min(FIRST_WAIT * 2**tries, LONGEST_WAIT)
            if halt.wait(wait if asked is None else min(max(wait, asked), LONGEST_RETRY_AFTER)):
                raise CaptionerError(f"{request.name}: {reason}")
        raise AssertionError("unreachable")

    def _no_answer(self) -> str:
        return f"no answer within {self.timeout:g} s from {self.address}; allow more time, or fewer requests at once"

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", **_authorization()}
        request = urllib.request.Request(self.address, body, headers)
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as reply:
                return _read_until(reply, deadline)
        except urllib.error.HTTPError as error:
            raise _Failed.from_status(error, self.address) from None
        except TimeoutError:
            raise _Failed(self._no_answer()) from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise _Failed(self._no_answer()) from None
            raise _Failed(
                f"{self.address} cannot be reached ({_one_line(str(cause) or type(cause).__name__)}); "
                "start the server, or correct its address"
            ) from None


class OpenAIChunk:
    """Requests with their images as data URLs."""

    def __init__(self, engine: OpenAIEngine, requests: Sequence[Request]):
        self._engine, self._requests = engine, requests
        self._images = [_data_url(request) for request in requests]

    def sample(self, picks: Sequence[tuple[int, int]]) -> list[Answer]:
        """One answer for each pick (index of a request, attempt); the first failure ends the waiting of all."""
        halt = threading.Event()

        def ask(pick: tuple[int, int]) -> Answer:
            index, attempt = pick
            return self._engine._ask(self._requests[index], self._images[index], attempt, halt)

        with ThreadPoolExecutor(self._engine.concurrency) as pool:
            try:
                return list(pool.map(ask, picks))
            except BaseException:
                halt.set()
                raise


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **settings: Any) -> None:
        return None


class _Failed(Exception):
    """Why a try failed; `final` ones would fail again, `refused` ones for what the request holds."""

    def __init__(self, reason: str, retry_after: float | None = None, final: bool = False, refused: bool = False):
        super().__init__(reason)
        self.reason, self.retry_after, self.final, self.refused = reason, retry_after, final or refused, refused

    @classmethod
    def from_status(cls, error: urllib.error.HTTPError, address: str) -> "_Failed":
        if error.code in (401, 403):  # whose text may repeat the key
            return cls(f"{address} refuses access (HTTP {error.code}): set {KEY} to a key that it knows", final=True)
        if 300 <= error.code < 400:
            return cls(f"{address} points elsewhere (HTTP {error.code}): give the final address", final=True)
        try:
            said = _one_line(error.read(2000).decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException):
            said = ""
        remedy = "correct the address, or the model's name" if error.code == 404 else "the server's log may tell why"
        reason = f"{address} answered HTTP {error.code}" + (f": {said}" if said else "") + f"; {remedy}"
        if error.code in PASSING:
            return cls(reason, _retry_after(error.headers.get("Retry-After")))
        return cls(reason, final=True, refused=error.code in REFUSED)


def _authorization() -> dict[str, str]:
    key = os.environ.get(KEY, "").strip()
    if not key:
        return {}
    if not key.isascii() or not key.isprintable():  # the library's own message would show it
        raise CaptionerError(f"{KEY} holds characters that no key has: set it again")
    return {"Authorization": f"Bearer {key}"}


def _one_line(text: str) -> str:
    """The beginning of `text` on one line, without the key."""
    key = os.environ.get(KEY, "").strip()
    text = text.replace(key, "***") if key else text
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:200]


def _retry_after(value: str | None) -> float | None:
    """Seconds from now that a Retry-After header names, as a number or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _read_until(reply: Any, deadline: float) -> bytes:
    """The whole body: a server that sends a byte now and then must not hold a run for ever."""
    parts, size = [], 0
    while part := reply.read1(65536):
        parts.append(part)
        size += len(part)
        if size > MAX_REPLY:
            raise _Failed(f"the server's answer is longer than {MAX_REPLY} bytes; correct its address")
        if time.monotonic() > deadline:
            raise TimeoutError
    if reply.length:
        raise _Failed("the server's answer broke off; its log may tell why")
    return b"".join(parts)


def _read_answer(reply: bytes, prefix: str) -> Answer:
    try:
        document = json.loads(reply)
        choice = document["choices"][0]
        text, reason = choice["message"]["content"] or "", choice["finish_reason"]
        tokens = int((document.get("usage") or {}).get("completion_tokens") or 0)
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError):
        said = _one_line(reply[:2000].decode("utf-8", "replace"))
        raise _Failed(f"the server's answer is no chat completion ({said}); correct its address") from None
    if prefix and not text.lstrip().startswith(prefix):
        text = prefix + text
    return Answer(text.strip(), tokens, reason == "stop")


def _data_url(request: Request) -> str:
    buffer = io.BytesIO()
    request.image.save(buffer, "JPEG", quality=95, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
