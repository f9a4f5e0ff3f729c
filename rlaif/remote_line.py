"""One request over HTTP and its whole reply, within a time that holds however the server spreads its bytes."""

import contextlib
import http.client
import math
import re
import socket
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from threading import Event
from typing import Any
from urllib.parse import urlsplit

LARGEST = 16 << 20  # bytes of an answer: 16 MiB
GZIP = b"\x1f\x8b"
TICK = 0.05  # seconds between two looks at a line that was hung up on and whose thread has not noticed


class Unreadable(ValueError):
    """A reply that cannot be an answer. The message holds nothing of it."""


@dataclass(frozen=True)
class Reply:
    """What a server says to a request."""

    status: int
    retry_after: str
    text: str


@dataclass
class Line:
    """A connection for one request after another, and when (time.monotonic) `watched` hangs up on the one under way."""

    connection: http.client.HTTPConnection
    until: float = math.inf
    talk: socket.socket | None = None

    def exchange(self, place: str, data: bytes, headers: dict[str, str], seconds: float, over: Event) -> Reply:
        """One POST. TimeoutError after `seconds`; OSError, HTTPException or ValueError for what is no whole reply."""
        self.until = until = time.monotonic() + seconds
        try:
            reply = self._exchange(place, data, headers, over)
        except (OSError, http.client.HTTPException, ValueError):
            if time.monotonic() >= until:
                raise TimeoutError from None
            raise
        finally:
            self.until = math.inf
        if time.monotonic() >= until:  # hung up on, which a reply without a length takes for its end
            raise TimeoutError
        return reply

    def close(self) -> None:
        self.connection.close()

    def hang_up(self) -> None:
        """Wake the thread that waits for an answer."""
        talk = self.talk  # its thread may close it meanwhile
        if talk is not None:
            with contextlib.suppress(OSError):  # closed by the other side
                # TLS's own way forgets its keys first: what a thread is sending would go on as plain text.
                socket.socket.shutdown(talk, socket.SHUT_RDWR)

    def _exchange(self, place: str, data: bytes, headers: dict[str, str], over: Event) -> Reply:
        if self.connection.sock is None:
            self.connection.connect()
        self.talk = talk = self.connection.sock
        assert talk is not None
        if over.is_set():  # asked only now: whoever ends the call hangs up on the lines that it sees connected
            raise ConnectionAbortedError
        talk.settimeout(max(0.001, self.until - time.monotonic()))
        self.connection.request("POST", place, data, headers)
        # From here on `talk` is not asked for: the connection closes it itself after a last reply.
        with self.connection.getresponse() as response:
            text = _without_key(_body(response).decode("utf-8", "replace"), headers)
            return Reply(response.status, response.headers.get("Retry-After", ""), text)


def open_line(url: str, seconds: float) -> Line:
    """A line to the server of `url`, not yet connected; certificates are verified."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "https":
        context = ssl.create_default_context()
        return Line(http.client.HTTPSConnection(host, parts.port, timeout=seconds, context=context))
    return Line(http.client.HTTPConnection(host, parts.port, timeout=seconds))


def watched(futures: Sequence[Future[Any]], lines: Sequence[Line], seconds: float) -> set[Future[Any]]:
    """Those that are done once all are, or one has failed. Until then lines are hung up on whose request takes longer
    than its `seconds`: a socket's own timeout begins anew with every byte.
    """
    while True:
        earliest = min([time.monotonic() + seconds, *(line.until for line in lines)])
        done, waiting = wait(futures, max(TICK, earliest - time.monotonic()), FIRST_EXCEPTION)
        if not waiting or any(future.exception() for future in done):
            return done
        for line in lines:
            if line.until <= time.monotonic():
                line.hang_up()


def _body(response: http.client.HTTPResponse) -> bytes:
    pieces, size = [], 0
    while piece := response.read1(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST:
            raise Unreadable("an answer of more than 16 MiB")
    whole = b"".join(pieces)  # less than was announced, if the connection was closed: then it is no JSON
    if whole.startswith(GZIP):
        raise Unreadable("an answer packed by gzip, which was not asked for")
    return whole


def _without_key(text: str, headers: dict[str, str]) -> str:
    """What a server says, should it repeat the key, as JSON may spell it: a slash as \\/ or \\u002f, for one. A key of
    under 8 characters is a word that stands for no key.
    """
    key = headers.get("Authorization", "").removeprefix("Bearer ")
    spelled = "".join(rf"\\?(?:{re.escape(char)}|(?i:u{ord(char):04x}))" for char in key)
    return re.sub(spelled, "[key]", text) if len(key) >= 8 else text
