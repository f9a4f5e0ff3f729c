"""Every fault that a judge's server can have: what is asked again, what abstains, what ends a call, and how soon."""

import gzip
import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable
from email.utils import formatdate
from threading import Event
from typing import Any

import pytest
from judge_server import (
    KEY,
    Body,
    chat_answer,
    number_of,
    numbered,
    numbered_readings,
    question,
    raw_reply,
    raw_serving,
    reader,
    sending,
    serving,
    waited,
)

from bylaw.rlaif import remote_line
from bylaw.rlaif.config import RemoteConfig
from bylaw.rlaif.reader import FILTERED, TOO_LONG, Reading, Thought
from bylaw.rlaif.remote_http import Server, _seconds


def test_hundreds_of_questions_lose_nothing_and_double_nothing_under_every_fault() -> None:
    faults = {0: 500, 1: 429, 2: "drop", 3: "cut", 4: "short", 5: 503, 6: (200, {}, '{"error": "busy"}'), 7: 408}

    def fault(body: Body, attempt: int) -> Any:
        n = number_of(body)
        return faults.get(n % 16) if attempt <= n % 3 else None

    with serving(numbered, fault) as server:
        judge = reader(server.url, concurrency=8)
        readings = judge.read([question(n) for n in range(320)])
    assert readings == numbered_readings(320)
    failed = {n: n % 3 + 1 for n in range(320) if n % 16 in faults}
    assert server.attempts.total() == 320 + sum(failed.values()) and len(server.attempts) == 320
    assert judge.counts["requests"] == 320
    assert sum(n for name, n in judge.counts.items() if name.startswith("again: ")) == sum(failed.values())
    assert judge.counts["again: status 429"] == sum(n for at, n in failed.items() if at % 16 == 1)
    cut = sum(n for at, n in failed.items() if at % 16 in (3, 4))
    assert judge.counts["again: an answer that is cut off or no JSON"] == cut


def test_as_many_requests_at_a_time_as_are_allowed() -> None:
    def slow(body: Body) -> Body:
        time.sleep(0.01)
        return numbered(body)

    with serving(slow) as server:
        assert reader(server.url, concurrency=3).read([question(n) for n in range(24)]) == numbered_readings(24)
        assert server.most_open == 3


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_request_that_takes_too_long_is_made_again(fault: str) -> None:
    with serving(numbered, lambda body, attempt: fault if attempt == 0 else None) as server:
        judge = reader(server.url, timeout_seconds=0.5)
        assert judge.read([question(0)]) == numbered_readings(1)
    assert judge.counts == {"requests": 1, "again: timed out": 1, "bounded": 0}


def test_a_server_that_asks_to_wait_is_left_alone_for_so_long() -> None:
    planted = (429, {"Retry-After": "1"}, "busy")
    with serving(numbered, lambda body, attempt: planted if attempt == 0 else None) as server:
        since = time.monotonic()
        assert reader(server.url).read([question(0)]) == numbered_readings(1)
        assert waited(since) >= 1
    assert _seconds(formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=2)
    assert _seconds("soon") == _seconds("") == _seconds("-5") == 0
    planted = (503, {"Retry-After": "86400"}, "tomorrow")
    with serving(numbered, lambda body, attempt: planted) as server:
        with pytest.raises(ConnectionError, match="asks to wait 86400 s: status 503: tomorrow"):
            reader(server.url).read([question(0)])
        assert len(server.seen) == 1


def test_pauses_double_and_differ_and_are_the_same_again() -> None:
    server = Server("http://localhost:1/v1", RemoteConfig(backoff_seconds=0.5))
    pauses = [[server._pause(number, failed) for failed in range(1, 12)] for number in range(3)]
    for pause in pauses:
        assert all(
            longest / 2 <= p <= longest for p, longest in zip(pause, (0.5, 1, 2, 4, 8, 16, 32, 60), strict=False)
        )
        assert pause[-1] <= 60
    assert len({pause[0] for pause in pauses}) == 3 and pauses[0][0] == server._pause(0, 1)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302])
def test_a_refusal_is_told_at_once(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    planted = (status, {"Location": "/elsewhere"}, json.dumps({"error": {"message": f"no\x1b[2J, {KEY}"}}))
    with serving(numbered, lambda body, attempt: planted if number_of(body) == 3 else None) as server:
        with pytest.raises(ConnectionError) as refused:
            reader(server.url).read([question(n) for n in range(40)])
        assert sum(number_of(body) == 3 for _, body, _ in server.seen) == 1
    text = str(refused.value)
    assert f"{server.url}/chat/completions, request 4 of 40: status {status}: no [2J, [key]" in text
    assert KEY not in repr(refused.value) and "\x1b" not in text
    assert {401: "'OPENAI_API_KEY' was sent", 404: "judge_server.model"}.get(status, "") in text


def test_a_request_that_fails_every_time_ends_the_call_and_the_others_soon() -> None:
    def fault(body: Body, attempt: int) -> Any:
        return 500 if number_of(body) == 2 else "hang" if number_of(body) > 2 else None

    with serving(numbered, fault) as server:
        since = time.monotonic()
        with pytest.raises(
            ConnectionError, match="request 3 of 40: failed 4 times, the last time: status 500: planted"
        ):
            reader(server.url, timeout_seconds=4.0).read([question(n) for n in range(40)])
        assert waited(since) < 2 and server.attempts.total() < 20
    with pytest.raises(ConnectionError, match="request 1 of 1: failed 4 times, the last time: connection failed"):
        reader(server.url).read([question(0)])  # nobody listens there now


def refusing(replies: list[tuple[int, str]]) -> Callable[[Body, int], Any]:
    """A fault for each of the first questions; the others are answered."""

    def fault(body: Body, attempt: int) -> Any:
        number = number_of(body)
        return (replies[number][0], {}, replies[number][1]) if number < len(replies) else None

    return fault


OVERLONG = [
    (400, '{"error": {"message": "x", "code": "context_length_exceeded"}}'),
    (400, '{"message": "This model\'s maximum context length is 16 tokens."}'),
    (400, '{"error": {"type": "exceed_context_size_error", "message": "exceeds the available context size"}}'),
    (422, '{"error": "`inputs` tokens + `max_new_tokens` must be <= 16"}'),
]


def test_a_question_longer_than_the_context_abstains() -> None:
    with serving(numbered, refusing(OVERLONG)) as server:
        readings = reader(server.url).read([question(n) for n in range(5)])
        [thought] = reader(server.url).think([Thought(question(0).messages, "", ("t",), 4)])
    assert readings == [Reading(None, TOO_LONG)] * 4 + numbered_readings(5)[4:]
    assert thought == {"text": "", "ids": [], "finish": "length"}


def test_retries_last_for_over_a_minute_and_a_half() -> None:
    config = RemoteConfig()
    server = Server("http://localhost:1/v1", config)
    assert sum(server._pause(0, failed) for failed in range(1, config.retries + 1)) > 90


CENSORED = [
    (400, '{"error": {"message": "The prompt triggered our content management policy", "code": "content_filter"}}'),
    (400, '{"error": {"message": "violates the content policy", "code": "x"}}'),
    (403, '{"error": {"message": "the model requires moderation and your input was flagged"}}'),
    (403, "blocked by content filter"),
    (200, '{"error": {"message": "no", "code": "content_filter"}}'),
]


def test_a_question_that_a_content_filter_refuses_abstains_alone() -> None:
    with serving(numbered, refusing(CENSORED)) as server:
        readings = reader(server.url).read([question(n) for n in range(6)])
        [thought] = reader(server.url).think([Thought(question(0).messages, "", ("t",), 4)])
        assert len(server.seen) == 7  # none of them asked again
    assert readings == [Reading(None, FILTERED)] * 5 + numbered_readings(6)[5:]
    assert thought == {"text": "", "ids": [], "finish": "content_filter"}


def test_other_refusals_still_end_the_call() -> None:
    """Even of a prompt that says moderation, which the server repeats beside its message."""
    said = json.dumps({"error": {"message": "bad request", "input": "on moderation"}})
    with serving(numbered, lambda body, attempt: (400, {}, said)) as server:
        with pytest.raises(ConnectionError, match="request 1 of 1: status 400: bad request"):
            reader(server.url).read([question(0)])
        assert len(server.seen) == 1


def test_an_answer_cut_by_a_content_filter() -> None:
    with serving(lambda body: chat_answer({}, "Well, first", "content_filter")) as server:
        [thought] = reader(server.url).think([Thought(question(0).messages, "", ("t",), 4)])
        assert reader(server.url).read([question(0)]) == [Reading(None, FILTERED)]
    assert thought == {"text": "Well, first", "ids": [], "finish": "content_filter"}


# The replies of older and newer servers, byte by byte.

GOOD = json.dumps(chat_answer({" A": -0.5, " B": -1.5})).encode()
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def newer_read1(self: Any, n: int = -1) -> bytes:
    """As CPython has it since gh-113199: the connection is closed with the last byte, not with the read after it."""
    if self.fp is None:
        return b""
    if self.chunked:
        return self._read1_chunked(n)
    if self.length is not None and (n < 0 or n > self.length):
        n = self.length
    result = self.fp.read1(n)
    if not result and n:
        self._close_conn()
    elif self.length is not None:
        self.length -= len(result)
        if not self.length:
            self._close_conn()
    return result


def older_read1(self: Any, n: int = -1) -> bytes:
    """As CPython had it before."""
    if self.fp is None:
        return b""
    if self.chunked:
        return self._read1_chunked(n)
    if self.length is not None and (n < 0 or n > self.length):
        n = self.length
    result = self.fp.read1(n)
    if not result and n:
        self._close_conn()
    elif self.length is not None:
        self.length -= len(result)
    return result


@pytest.mark.parametrize("read1", [older_read1, newer_read1])
@pytest.mark.parametrize(
    ("reply", "keep"),
    [
        (raw_reply(GOOD), True),
        (raw_reply(GOOD, headers="Connection: close\r\n"), False),
        (raw_reply(GOOD, headers="Connection: close\r\n", length=False), False),
        (raw_reply(GOOD, version="1.0"), False),
        (raw_reply(GOOD, version="1.0", length=False), False),
        (CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD), True),
    ],
    ids=["kept", "closed", "closed, no length", "1.0", "1.0, no length", "chunked"],
)
def test_every_form_of_reply_is_read(
    read1: Callable[..., bytes], reply: bytes, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http.client.HTTPResponse, "read1", read1)
    with raw_serving(sending(reply, keep)) as server:
        judge = reader(server.url, concurrency=2)
        assert judge.read([question(n) for n in range(8)]) == [Reading((-0.5, -1.5))] * 8
        assert judge.counts == {"requests": 8, "bounded": 0} and server.requests == 8
        assert server.connections == (2 if keep else 8)  # one for each that is under way, as long as it is kept


def dripping(begun: bytes, each: bytes) -> Callable[[socket.socket], bool]:
    def behave(talk: socket.socket) -> bool:
        talk.sendall(begun)
        until = time.monotonic() + 5
        while time.monotonic() < until:
            talk.sendall(each)
            time.sleep(0.05)
        return False

    return behave


@pytest.mark.parametrize(
    ("begun", "each"),
    [
        (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"a"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (CHUNKED, b"0"),
        (CHUNKED, b"1\r\n \r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        (b"", b"H"),
    ],
    ids=["headers", "continue", "chunk size", "chunks", "no length", "status"],
)
def test_a_server_that_drips_runs_out_of_time(begun: bytes, each: bytes) -> None:
    """Each byte comes long before a socket's own timeout."""
    with raw_serving(dripping(begun, each)) as server:
        since = time.monotonic()
        with pytest.raises(ConnectionError, match="failed 2 times, the last time: timed out"):
            reader(server.url, timeout_seconds=0.4, retries=1).read([question(0)])
        assert 0.8 <= waited(since) < 8 and server.requests == 2


def test_a_line_that_is_slow_does_not_hold_up_the_others() -> None:
    def fault(body: Body, attempt: int) -> Any:
        return "drip" if number_of(body) == 0 and attempt < 2 else None

    with serving(numbered, fault) as server:
        judge = reader(server.url, timeout_seconds=0.8, concurrency=2)
        assert judge.read([question(n) for n in range(20)]) == numbered_readings(20)
    assert judge.counts["again: timed out"] == 2 and judge.counts.total() == 22


def test_no_request_goes_out_once_another_has_ended_the_call() -> None:
    over = Event()
    over.set()
    with raw_serving(sending(raw_reply(GOOD))) as server:
        line = remote_line.open_line(server.url, 5.0)
        with pytest.raises(ConnectionAbortedError):
            line.exchange("/v1/chat/completions", b"{}", {}, 5.0, over)
        line.close()
        time.sleep(0.05)
        assert server.requests == 0


def test_an_error_in_place_of_an_answer_is_told_in_the_servers_words() -> None:
    said = '{"error": {"message": "model zzz\\u001b[2J not loaded"}}'
    with serving(numbered, lambda body, attempt: (200, {}, said)) as server:
        judge = reader(server.url, retries=1)
        with pytest.raises(
            ConnectionError, match=r"failed 2 times, the last time: status 200: model zzz \[2J not loaded"
        ):
            judge.read([question(0)])
    with serving(numbered, lambda body, attempt: (200, {}, said) if not attempt else None) as server:
        assert reader(server.url).read([question(0)]) == numbered_readings(1)


def test_an_answer_that_is_packed_is_named() -> None:
    packed = raw_reply(gzip.compress(GOOD), headers="Content-Encoding: gzip\r\n")
    with (
        raw_serving(sending(packed)) as server,
        pytest.raises(ConnectionError, match="an answer packed by gzip, which was not asked for"),
    ):
        reader(server.url, retries=0).read([question(0)])


def test_an_answer_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_line, "LARGEST", 1000)
    endless = raw_reply(GOOD[:-1] + b" " * 1001 + GOOD[-1:])
    with (
        raw_serving(sending(endless)) as server,
        pytest.raises(ConnectionError, match="an answer of more than 16 MiB"),
    ):
        reader(server.url, retries=0).read([question(0)])


def test_a_certificate_that_is_not_valid_ends_the_call_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def connect(line: Any) -> None:
        tried.append(line.host)
        error = ssl.SSLCertVerificationError("certificate verify failed")
        error.verify_message = "self-signed certificate"
        raise error

    monkeypatch.setattr(http.client.HTTPSConnection, "connect", connect)
    with pytest.raises(ConnectionError, match="its certificate is not valid: self-signed certificate"):
        reader("https://judge.example/v1").read([question(0)])
    assert tried == ["judge.example"]


def test_hanging_up_leaves_the_keys_of_tls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own shutdown forgets them first, and what another thread is sending would go on unencrypted."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = remote_line.open_line("https://judge.example/v1", 1.0)
        secured = ssl.create_default_context().wrap_socket(
            ours, server_hostname="judge.example", do_handshake_on_connect=False
        )
        line.talk = secured
        line.hang_up()
        assert secured._sslobj is not None and theirs.recv(1) == b""  # type: ignore[attr-defined]
        secured.close()
