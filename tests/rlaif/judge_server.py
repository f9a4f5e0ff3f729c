"""A judge's server for tests: real HTTP on this machine, answers from a function, and faults where planted."""

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from bylaw.model.sampler import turn
from bylaw.rlaif.config import RemoteConfig
from bylaw.rlaif.reader import Question, Reading
from bylaw.rlaif.remote import RemoteReader

Body = dict[str, Any]
Reply = Callable[[Body], Any]
Fault = Callable[[Body, int], Any]


class JudgeServer(ThreadingHTTPServer):
    """`reply(body)` is what it answers as JSON. `fault(body, attempt)`, attempts counted from 0 for each body, may say
    what goes wrong instead: a status, (status, headers, text), or "drop", "hang", "drip", "cut", "short".
    """

    daemon_threads, request_queue_size = True, 64

    def __init__(self, reply: Reply, fault: Fault) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.fault = reply, fault
        self.seen: list[tuple[str, Body, dict[str, str]]] = []
        self.attempts: Counter[str] = Counter()
        self.open, self.most_open = 0, 0
        self.lock, self.over = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are wanted here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: JudgeServer

    def do_POST(self) -> None:
        server, data = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(data)
        with server.lock:
            attempt = server.attempts[data.decode()]
            server.attempts[data.decode()] += 1
            server.seen.append((self.path, body, dict(self.headers)))
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        try:
            self._say(server.fault(body, attempt), lambda: json.dumps(server.reply(body)).encode())
        finally:
            with server.lock:
                server.open -= 1

    def _say(self, fault: Any, answer: Callable[[], bytes]) -> None:
        if fault is None:
            self._send(200, answer())
        elif isinstance(fault, int):
            self._send(fault, b'{"error": {"message": "planted"}}')
        elif isinstance(fault, tuple):
            status, headers, text = fault
            self._send(status, text.encode(), headers)
        elif fault == "cut":
            self._send(200, answer()[:-9])
        elif fault == "drip":
            self._send(200, b"", {"Content-Length": "99"})
            while not self.server.over.wait(0.02):
                self.wfile.write(b" ")
        else:
            if fault == "hang":
                self.server.over.wait(5)
            if fault == "short":
                whole = answer()
                self._send(200, whole[:-9], {"Content-Length": str(len(whole))})
            self.close_connection = True

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(reply: Reply, fault: Fault = lambda body, attempt: None) -> Iterator[JudgeServer]:
    server = JudgeServer(reply, fault)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def chat_answer(listed: dict[str, float], text: str = "A", finish: str = "length") -> Body:
    """What /v1/chat/completions answers."""
    top = [{"token": token, "logprob": p, "bytes": list(token.encode())} for token, p in listed.items()]
    first = {**top[0], "top_logprobs": top} if top else {"token": "", "logprob": 0.0, "top_logprobs": []}
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": {"content": [first]}}]}


def completion_answer(listed: dict[str, float], text: str = " A", finish: str = "length") -> Body:
    """What /v1/completions answers."""
    logprobs = {"tokens": [text], "token_logprobs": [-0.1], "top_logprobs": [listed], "text_offset": [0]}
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": logprobs}]}


def waited(since: float) -> float:
    return time.monotonic() - since


KEY = "sk-planted-7f3a9c"
QUICK = {"model": "m", "timeout_seconds": 30.0, "backoff_seconds": 0.002, "retries": 3}


def reader(url: str, **settings: Any) -> RemoteReader:
    return RemoteReader(url=url, config=RemoteConfig(**{**QUICK, **settings}), seed=5, prefix="so :")


# Questions whose numbers come back, so that readings cannot change places unseen.


def question(number: int) -> Question:
    return Question([turn("user", f"question {number} ?")], "so :")


def number_of(body: Body) -> int:
    found = re.search(r"question (\d+) \?", json.dumps(body))
    assert found
    return int(found[1])


def numbered(body: Body) -> Body:
    """The letter A has the question's number in its log-prob."""
    return chat_answer({" A": -number_of(body) / 1000 - 0.001, " B": -9.0, " C": -10.0})


def numbered_readings(count: int) -> list[Reading]:
    return [Reading((-n / 1000 - 0.001, -9.0)) for n in range(count)]


# Replies byte by byte.

Behave = Callable[[socket.socket], bool]


class RawServer:
    """Has `behave` send what follows each request, and hangs up after one for which it says False."""

    def __init__(self, behave: Behave) -> None:
        self.behave, self.over = behave, threading.Event()
        self.connections, self.requests = 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"

    def listen(self) -> None:
        while True:
            try:
                talk, _ = self.listener.accept()
            except OSError:  # closed
                return
            self.connections += 1
            threading.Thread(target=self.answer, args=(talk,), daemon=True).start()

    def answer(self, talk: socket.socket) -> None:
        with talk, talk.makefile("rb") as file:
            try:
                while (length := _length(file)) >= 0:
                    file.read(length)
                    self.requests += 1
                    if not self.behave(talk):
                        return
            except OSError:  # the client hung up
                return


def _length(file: Any) -> int:
    """Of the body after the headers of a request; -1 where none comes."""
    length = -1
    while (line := file.readline()).strip():
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return length


@contextmanager
def raw_serving(behave: Behave) -> Iterator[RawServer]:
    server = RawServer(behave)
    thread = threading.Thread(target=server.listen, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.listener.shutdown(socket.SHUT_RDWR)
        server.listener.close()
        thread.join()


def raw_reply(content: bytes, version: str = "1.1", headers: str = "", length: bool = True) -> bytes:
    counted = f"Content-Length: {len(content)}\r\n" if length else ""
    return f"HTTP/{version} 200 OK\r\n{headers}{counted}\r\n".encode() + content


def sending(data: bytes, keep: bool = True) -> Behave:
    def behave(talk: socket.socket) -> bool:
        talk.sendall(data)
        return keep

    return behave
