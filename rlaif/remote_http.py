"""JSON over HTTP to a server that may be slow, overloaded or broken: so many requests at a time, each until it is
answered. Redirects are not followed, so that a key goes nowhere else.
"""

import http.client
import ipaddress
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from bylaw.kernels.philox import request_id, uniform_scalar
from bylaw.rlaif.config import RemoteConfig, check_server
from bylaw.rlaif.reader import FILTERED, TOO_LONG
from bylaw.rlaif.remote_line import Line, Reply, Unreadable, open_line, watched

LONGEST_BACKOFF = 60.0  # seconds between attempts, unless the server asks for longer
LONGEST_WAIT = 600.0  # seconds that a server may ask for
SHOWN = 300  # characters of a server's message
# What servers say of a prompt that is too long: OpenAI, vLLM and SGLang, llama.cpp, TGI.
_TOO_LONG = re.compile(
    "context.(length|size|window)|maximum input length|prompt is too long|max_new_tokens`? must", re.I
)
# And of one that they will not have answered: Azure and OpenAI, and what stands before other models.
_FILTERED = re.compile("content.?(filter|(management )?policy)|moderation|responsibleai|flagged as", re.I)


@dataclass(frozen=True)
class Answer:
    """The first choice of a server's answer, or None and `why` it refuses this one request; the faults before it."""

    choice: dict[str, Any] | None
    why: str = ""
    faults: tuple[str, ...] = ()


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
        seconds = self.config.timeout_seconds
        lines = [open_line(self.url, seconds) for _ in range(min(self.config.concurrency, len(bodies)))]
        idle: SimpleQueue[Line] = SimpleQueue()
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
            return _together(work, len(bodies), lines, seconds)
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

    def _answer(
        self,
        line: Line,
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

    def _attempt(self, line: Line, path: str, data: bytes, headers: dict[str, str], over: Event) -> "Answer | _Fault":
        """One attempt. ConnectionError for what another one will not mend."""
        place = urlsplit(self.url).path.rstrip("/") + path
        try:
            reply = line.exchange(place, data, headers, self.config.timeout_seconds, over)
            choice = _choice(reply.text) if reply.status == http.client.OK else None
        except ssl.SSLCertVerificationError as error:
            raise ConnectionError(f"its certificate is not valid: {error.verify_message}") from None
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            return _Fault(_named(error), _named(error))
        if choice is not None:
            return Answer(choice)
        if why := _abstention(reply):
            return Answer(None, why)
        told = self._refusal(reply, headers)
        if reply.status in (200, 408, 425, 429) or reply.status >= 500:
            name = "an error in place of an answer" if reply.status == 200 else f"status {reply.status}"
            return _Fault(name, told, _seconds(reply.retry_after))
        raise ConnectionError(told)

    def _pause(self, number: int, failed: int) -> float:
        """Seconds before the next attempt: doubled each time, less a part that differs from request to request, so
        that those which failed together do not come together again.
        """
        longest = min(self.config.backoff_seconds * 2.0 ** (failed - 1), LONGEST_BACKOFF)
        return longest * (1 - uniform_scalar(0, request_id("retry", number), failed) / 2)

    def _refusal(self, reply: Reply, headers: dict[str, str]) -> str:
        """The status, the server's message without control characters, and what may mend it."""
        message = str(_error(reply.text)["message"])
        said = "".join(char if char.isprintable() else " " for char in message)[:SHOWN].strip()
        sent = "was sent" if "Authorization" in headers else "was not sent: none is set"
        about_key = f" (the key of the environment variable {self.config.key_variable!r} {sent})"
        about_place = " (is judge_server.model the server's name for it, and does the URL end in /v1?)"
        hints = {401: about_key, 403: about_key, 404: about_place}
        return f"status {reply.status}: {said or 'no message'}{hints.get(reply.status, '')}"


def _together(work: Callable[[int, Event], Answer], count: int, lines: Sequence[Line], seconds: float) -> list[Answer]:
    """`work` of 0 to `count` - 1, in order, one on each line at a time. What one raises ends the others."""
    over = Event()
    with ThreadPoolExecutor(max(1, len(lines)), thread_name_prefix="judge") as pool:
        futures = [pool.submit(work, number, over) for number in range(count)]
        try:
            done = watched(futures, lines, seconds)
            failed = [future for future in futures if future in done and future.exception()]
            return [future.result() for future in failed or futures]
        finally:  # also after Ctrl-C
            over.set()
            for future in futures:
                future.cancel()
            for line in lines:
                line.hang_up()


def _choice(text: str) -> dict[str, Any] | None:
    """The first choice of an answer; None for an error in its place. ValueError for what is neither."""
    answer = json.loads(text)
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    if isinstance(answer, dict) and answer.get("error"):
        return None
    raise Unreadable("an answer without choices")


def _abstention(reply: Reply) -> str:
    """Why a reply refuses this question and not others; "" for one that does not say so."""
    error = _error(reply.text)
    if reply.status in (200, 400, 413, 422) and _TOO_LONG.search(reply.text):
        return TOO_LONG
    told = f"{error.get('code')} {error.get('type')} {error['message']}"
    return FILTERED if reply.status in (200, 400, 403) and _FILTERED.search(told) else ""


def _error(text: str) -> dict[str, Any]:
    """What a server says went wrong: its error, or whatever it sent as the message of one."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return {"message": text}
    return {"message": text} | (error if isinstance(error, dict) else {"message": error or text})


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
    if isinstance(error, Unreadable):
        return str(error)
    if isinstance(error, ValueError | RecursionError | http.client.IncompleteRead):
        return "an answer that is cut off or no JSON"
    return f"connection failed: {getattr(error, 'strerror', None) or type(error).__name__}"


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
