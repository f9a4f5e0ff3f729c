"""JSON over HTTP to a server that may be slow, overloaded or broken: so many requests at a time, each until it is
answered. Redirects are not followed, so that a key goes nowhere else.
"""

import contextlib
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from bylaw.kernels.philox import request_id, uniform_scalar
from bylaw.rlaif.config import RemoteConfig, check_server

LONGEST_BACKOFF = 60.0  # seconds between attempts, unless the server asks for longer
LONGEST_WAIT = 600.0  # seconds that a server may ask for
LARGEST = 16 << 20  # bytes of an answer: 16 MiB
SHOWN = 300  # characters of a server's message
# What servers say of a prompt that is too long: OpenAI, vLLM and SGLang, llama.cpp, TGI.
_TOO_LONG = re.compile(
    "context.(length|size|window)|maximum input length|prompt is too long|max_new_tokens`? must", re.I
)


@dataclass(frozen=True)
class Answer:
    """The first choice of a server's answer, or None for a prompt longer than its context; and the faults before it."""

    choice: dict[str, Any] | None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Reply:
    status: int
    retry_after: str
    text: str


@dataclass(frozen=True)
class _Fault:
    """What went wrong with an attempt that may be made again, and the seconds that the server asks to wait before."""

    name: str
    told: str
    wait: float = 0.0


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server at `url`, which ends in /v1. Raises ValueError for a URL that `check_server` refuses.

    The key is read from the environment for each call and kept nowhere.
    """

    url: str
    config: RemoteConfig

    def __post_init__(self) -> None:
        check_server(self.url)

    def ask(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
        """POST each body to `path`, `concurrency` at a time; one answer for each, in order.

        The first request that is refused, or fails `retries` + 1 times, ends the call, and those under way with it:
        ConnectionError names the request, the status and the server's message. Raises ValueError for a key that cannot
        be sent.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := self.key():
            headers["Authorization"] = f"Bearer {key}"
        lines = [self._line() for _ in range(min(self.config.concurrency, len(bodies)))]
        idle: SimpleQueue[http.client.HTTPConnection] = SimpleQueue()
        for line in lines:
            idle.put(line)

        def work(number: int, over: Event) -> Answer:
            line, data = idle.get(), json.dumps(bodies[number]).encode()
            try:
                return self._answer(line, path, data, headers, number, over)
            except ConnectionError as error:
                raise ConnectionError(f"{self.url}{path}, request {number + 1} of {len(bodies)}: {error}") from None
            finally:
                idle.put(line)

        try:
            return _together(work, len(bodies), lines)
        finally:
            for line in lines:
                line.close()

    def key(self) -> str:
        """The key, "" for none. ValueError, without showing it, for one that no header can hold or that would go over
        a network unencrypted.
        """
        name = self.config.key_variable
        key = os.environ.get(name, "").strip() if name else ""
        if not key.isascii() or not all(33 <= ord(char) < 127 for char in key):
            raise ValueError(f"the key in {name} holds characters that no key has (spaces, line breaks, accents)")
        if key and self.url.lower().startswith("http:") and not _is_local(self.url):
            raise ValueError(
                f"the key in {name} would go to {self.url} unencrypted; allowed: https, http to this machine, or "
                'judge_server.key_variable = "" to send none'
            )
        return key

    def _line(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        host, seconds = parts.hostname or "", self.config.timeout_seconds
        if parts.scheme == "https":
            return http.client.HTTPSConnection(host, parts.port, timeout=seconds, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, parts.port, timeout=seconds)

    def _answer(
        self,
        line: http.client.HTTPConnection,
        path: str,
        data: bytes,
        headers: dict[str, str],
        number: int,
        over: Event,
    ) -> Answer:
        """The answer to one request, after as many attempts as it takes. ConnectionError when there will be none."""
        faults: list[str] = []
        while True:
            tried = self._attempt(line, path, data, headers, over)
            if isinstance(tried, Answer):
                return replace(tried, faults=tuple(faults))
            line.close()
            faults.append(tried.name)
            if len(faults) > self.config.retries:
                raise ConnectionError(f"failed {len(faults)} times, the last time: {tried.told}")
            if tried.wait > LONGEST_WAIT:
                raise ConnectionError(f"the server asks to wait {tried.wait:g} s: {tried.told}")
            if over.wait(max(tried.wait, self._pause(number, len(faults)))):
                raise ConnectionError("given up, since another request failed")

    def _attempt(
        self, line: http.client.HTTPConnection, path: str, data: bytes, headers: dict[str, str], over: Event
    ) -> "Answer | _Fault":
        """One attempt. ConnectionError for what another one will not mend."""
        place = urlsplit(self.url).path.rstrip("/") + path
        try:
            reply = _exchange(line, place, data, headers, self.config.timeout_seconds, over)
            if reply.status == http.client.OK:
                return Answer(_choice(reply.text))
        except ssl.SSLCertVerificationError as error:
            raise ConnectionError(f"its certificate is not valid: {error.verify_message}") from None
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            return _Fault(_named(error), _named(error))
        if reply.status in (400, 413, 422) and _TOO_LONG.search(reply.text):
            return Answer(None)
        told = self._refusal(reply, headers)
        if reply.status in (408, 425, 429) or reply.status >= 500:
            return _Fault(f"status {reply.status}", told, _seconds(reply.retry_after))
        raise ConnectionError(told)

    def _pause(self, number: int, failed: int) -> float:
        """Seconds before the next attempt: doubled each time, less a part that differs from request to request, so
        that those which failed together do not come together again.
        """
        longest = min(self.config.backoff_seconds * 2.0 ** (failed - 1), LONGEST_BACKOFF)
        return longest * (1 - uniform_scalar(0, request_id("retry", number), failed) / 2)

    def _refusal(self, reply: _Reply, headers: dict[str, str]) -> str:
        """The status, the server's message without control characters, and what may mend it."""
        said = "".join(char if char.isprintable() else " " for char in _message(reply.text))[:SHOWN].strip()
        sent = "was sent" if "Authorization" in headers else "was not sent: none is set"
        about_key = f" (the key of the environment variable {self.config.key_variable!r} {sent})"
        about_place = " (is judge_server.model the server's name for it, and does the URL end in /v1?)"
        hints = {401: about_key, 403: about_key, 404: about_place}
        return f"status {reply.status}: {said or 'no message'}{hints.get(reply.status, '')}"


def _together(
    work: Callable[[int, Event], Answer], count: int, lines: Sequence[http.client.HTTPConnection]
) -> list[Answer]:
    """`work` of 0 to `count` - 1, in order, one on each line at a time. What one raises ends the others."""
    over = Event()
    with ThreadPoolExecutor(max(1, len(lines)), thread_name_prefix="judge") as pool:
        futures = [pool.submit(work, number, over) for number in range(count)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in futures if future in done and future.exception()]
            return [future.result() for future in failed or futures]
        finally:  # also after Ctrl-C
            over.set()
            for future in futures:
                future.cancel()
            for line in lines:
                _hang_up(line)


def _exchange(
    line: http.client.HTTPConnection, place: str, data: bytes, headers: dict[str, str], seconds: float, over: Event
) -> _Reply:
    """One request and its reply, whole. TimeoutError after `seconds`, however the server spreads its bytes."""
    until = time.monotonic() + seconds
    if line.sock is None:
        line.connect()
    if over.is_set():  # asked only now: whoever ends the call hangs up on the lines that it sees connected
        raise ConnectionAbortedError
    talk: socket.socket = line.sock  # type: ignore[assignment]
    talk.settimeout(_left(until))
    line.request("POST", place, data, headers)
    talk.settimeout(_left(until))
    with line.getresponse() as response:
        text = _without_key(_body(response, talk, until).decode("utf-8", "replace"), headers)
        return _Reply(response.status, response.headers.get("Retry-After", ""), text)


def _body(response: http.client.HTTPResponse, talk: socket.socket, until: float) -> bytes:
    pieces, size = [], 0
    while piece := response.read1(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST:
            raise ValueError("too long")
        talk.settimeout(_left(until))
    return b"".join(pieces)  # less than was announced, if the connection was closed: then it is no JSON


def _without_key(text: str, headers: dict[str, str]) -> str:
    """What a server says, should it repeat the key, as JSON may spell it: a slash as \\/ or \\u002f, for one. A key of
    under 8 characters is a word that stands for no key.
    """
    key = headers.get("Authorization", "").removeprefix("Bearer ")
    spelled = "".join(rf"\\?(?:{re.escape(char)}|(?i:u{ord(char):04x}))" for char in key)
    return re.sub(spelled, "[key]", text) if len(key) >= 8 else text


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _choice(text: str) -> dict[str, Any]:
    """The first choice of an answer. ValueError for what is no such answer."""
    answer = json.loads(text)
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("no choices")
    return choices[0]


def _message(text: str) -> str:
    """What a server says went wrong: error.message, or whatever it sent."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, TypeError, KeyError, RecursionError):
        return text


def _seconds(retry_after: str) -> float:
    """What a Retry-After header asks for: seconds, or a date (RFC 9110, section 10.2.3); 0 for neither."""
    if re.fullmatch("[0-9]{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _named(error: BaseException) -> str:
    """A failed attempt in words that hold nothing of the request."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, json.JSONDecodeError | RecursionError | http.client.IncompleteRead):
        return "an answer that is cut off or no JSON"
    if isinstance(error, ValueError):
        return "an answer without choices, or of more than 16 MiB"
    return f"connection failed: {getattr(error, 'strerror', None) or type(error).__name__}"


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _hang_up(line: http.client.HTTPConnection) -> None:
    """Wake a thread that waits for an answer."""
    talk: socket.socket | None = line.sock  # its thread may close and forget it meanwhile
    if talk is not None:
        with contextlib.suppress(OSError):  # closed by the other side
            talk.shutdown(socket.SHUT_RDWR)
