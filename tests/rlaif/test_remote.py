"""A judge behind HTTP: what it is asked, how its answers are read, and every fault that a server can have."""

import dataclasses
import http.client
import json
import math
import re
import ssl
import time
from email.utils import formatdate
from typing import Any

import pytest
from judge_server import KEY, Body, chat_answer, completion_answer, reader, serving, waited

from bylaw.model.sampler import turn
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.config import RemoteConfig, check_server
from bylaw.rlaif.reader import TOO_LONG, LocalReader, Question, Reading, Thought
from bylaw.rlaif.remote import NO_LETTER, NO_LOGPROBS, letters
from bylaw.rlaif.remote_http import Server, _seconds


def question(number: int) -> Question:
    return Question([turn("user", f"question {number} ?")], "so :")


def number_of(body: Body) -> int:
    found = re.search(r"question (\d+) \?", json.dumps(body))
    assert found
    return int(found[1])


def numbered(body: Body) -> Body:
    """The letter A has the question's number in its log-prob, so that readings cannot change places unseen."""
    return chat_answer({" A": -number_of(body) / 1000 - 0.001, " B": -9.0, " C": -10.0})


def numbered_readings(count: int) -> list[Reading]:
    return [Reading((-n / 1000 - 0.001, -9.0)) for n in range(count)]


# How an answer is read.


def test_spellings_of_a_letter_are_added_up_and_no_others() -> None:
    listed = {" A": 0.2, "A": 0.1, "▁A": 0.04, "ĠA": 0.01, "a": 0.2, "(A": 0.1, "A.": 0.02, " B": 0.06, "B\n": 0.01}
    reading = letters({token: math.log(p) for token, p in listed.items()})
    assert reading.logprobs == pytest.approx((math.log(0.35), math.log(0.07))) and not reading.bounded


@pytest.mark.parametrize(
    ("listed", "bound"),
    [
        ({"A": 0.6, "x": 0.2, "y": 0.01}, 0.01),  # it would be listed if it were likelier than the last
        ({"A": 0.6, "x": 0.37}, 0.03),  # and it is part of what is left
        ({"A": 1.0}, 1e-6),
    ],
)
def test_a_letter_that_is_not_listed_has_a_bound(listed: dict[str, float], bound: float) -> None:
    for token, at in (("A", 1), ("B", 0)):
        named = {(token if one == "A" else one): math.log(p) for one, p in listed.items()}
        reading = letters(named)
        assert reading.bounded and reading.logprobs is not None
        assert reading.logprobs[at] == pytest.approx(math.log(bound))
        assert reading.logprobs[1 - at] == pytest.approx(math.log(listed["A"]))


def test_what_cannot_be_read_has_its_reason() -> None:
    assert letters({"a": -0.1, "The": -2.0}) == Reading(None, NO_LETTER)
    assert letters({}) == Reading(None, NO_LOGPROBS)


HOSTILE = [
    {"choices": [{"message": {"content": "A"}}]},
    {"choices": [{"logprobs": None}]},
    {"choices": [{"logprobs": {"content": []}}]},
    {"choices": [{"logprobs": {"content": [{"token": "A", "logprob": -0.1}]}}]},
    {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "A", "logprob": "-0.1"}]}]}}]},
    {"choices": [{"logprobs": {"top_logprobs": [{"A": float("nan"), "B": 3, "C": -(10**30)}]}}]},
    {"choices": [{"logprobs": [1]}]},
]


def test_answers_without_log_probs_abstain_one_by_one() -> None:
    def reply(body: Body) -> Any:
        n = number_of(body)
        return HOSTILE[n] if n < len(HOSTILE) else numbered(body)

    with serving(reply) as server:
        judge = reader(server.url)
        readings = judge.read([question(n) for n in range(len(HOSTILE) + 2)])
    assert readings[: len(HOSTILE)] == [Reading(None, NO_LOGPROBS)] * len(HOSTILE)
    assert readings[len(HOSTILE) :] == numbered_readings(len(HOSTILE) + 2)[len(HOSTILE) :]


# What a server is asked.

SHOTS = [turn("user", "w1 ?"), turn("assistant", "so : B") | {"ids": [1]}, turn("user", "w2 ?")]


def asked(style: str, answer: Body) -> tuple[str, Body]:
    with serving(lambda body: answer) as server:
        [reading] = reader(server.url, style=style).read([Question(SHOTS, "so :")])
        [(path, body, headers)] = server.seen
    assert reading == Reading((-0.5, -1.5)) and headers["Content-Type"] == "application/json"
    assert (body.pop("model"), body.pop("max_tokens"), body.pop("temperature")) == ("m", 1, 1)
    return path, body


def test_the_three_styles() -> None:
    listed = {" A": -0.5, " B": -1.5}
    line = "Reply with one letter, A or B, which goes on from here:\nso :"
    shown = [turn("user", f"w1 ?\n\n{line}"), turn("assistant", "B"), turn("user", f"w2 ?\n\n{line}")]
    probs = {"logprobs": True, "top_logprobs": 20}
    assert asked("chat", chat_answer(listed)) == ("/v1/chat/completions", {"messages": shown, **probs})
    turns = [turn("user", "w1 ?"), turn("assistant", "so : B"), turn("user", "w2 ?"), turn("assistant", "so :")]
    open_end = {"messages": turns, "continue_final_message": True, "add_generation_prompt": False}
    assert asked("continue", chat_answer(listed)) == ("/v1/chat/completions", open_end | probs)
    text = "\n\nHuman: w1 ?\n\nAssistant: so : B\n\nHuman: w2 ?\n\nAssistant: so :"
    assert asked("completions", completion_answer(listed)) == ("/v1/completions", {"prompt": text, "logprobs": 20})


@pytest.mark.parametrize("style", ["chat", "completions"])
def test_thoughts(style: str) -> None:
    def reply(body: Body) -> Body:
        n = number_of(body)
        make = chat_answer if style == "chat" else completion_answer
        return make({"x": -0.1}, f" thought {n} \ud800", "stop" if n else "length")

    thoughts = [Thought(question(n).messages, "step :", ("thought", n), 9, 0.5, ("so :",)) for n in range(3)]
    with serving(reply) as server:
        said = reader(server.url, style=style).think(thoughts)
        bodies = sorted((body for _, body, _ in server.seen), key=number_of)
        again = reader(server.url, style=style).think(thoughts[:1])
        repeated = server.seen[-1][1]
    assert (
        said == [{"text": f"thought {n} ?", "ids": [], "finish": "stop" if n else "length"} for n in range(3)]
        and again == said[:1]
    )
    assert len({body["seed"] for body in bodies}) == 3 and repeated == bodies[0]
    assert all((body["max_tokens"], body["temperature"]) == (9, 0.5) for body in bodies)
    assert all(body["stop"][-1] == "so :" for body in bodies) and "logprobs" not in bodies[0]
    last = bodies[0]["messages"][-1]["content"] if style == "chat" else bodies[0]["prompt"]
    assert last.endswith("\nstep :" if style == "chat" else "question 0 ?\n\nAssistant: step :")


def test_the_same_judge_here_and_behind_http_reads_the_same(known_judge: Any, tokenizer: Tokenizer) -> None:
    def reply(body: Body) -> Body:
        *turns, begun = body["messages"]
        a, b = known_judge._letters(tokenizer.prompt_ids(turns, prefix=begun["content"]))
        return chat_answer({" A": a, " B": b, "</s>": math.log(0.5)})

    pairs = [("w1 good", "w2"), ("w3", "good good"), ("w4", "w5")]
    questions = [Question([turn("user", f"w1 which rule one A {a} B {b}")], "so :") for a, b in pairs]
    here = LocalReader(engine=known_judge, seed=5, prefix="so :", hash="abc").read(questions)
    with serving(reply) as server:
        there = reader(server.url, style="continue").read(questions)
    assert here == there and len({reading.logprobs for reading in here}) == 3


# Faults.


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


OVERLONG = [
    (400, '{"error": {"message": "x", "code": "context_length_exceeded"}}'),
    (400, '{"message": "This model\'s maximum context length is 16 tokens."}'),
    (400, '{"error": {"type": "exceed_context_size_error", "message": "exceeds the available context size"}}'),
    (422, '{"error": "`inputs` tokens + `max_new_tokens` must be <= 16"}'),
]


def test_a_question_longer_than_the_context_abstains() -> None:
    def fault(body: Body, attempt: int) -> Any:
        status, text = OVERLONG[number_of(body)] if number_of(body) < len(OVERLONG) else (0, "")
        return (status, {}, text) if status else None

    with serving(numbered, fault) as server:
        readings = reader(server.url).read([question(n) for n in range(5)])
        [thought] = reader(server.url).think([Thought(question(0).messages, "", ("t",), 4)])
    assert readings == [Reading(None, TOO_LONG)] * 4 + numbered_readings(5)[4:]
    assert thought == {"text": "", "ids": [], "finish": "length"}


# Before any work.


def test_certificates_are_verified() -> None:
    line = Server("https://judge.example/v1", RemoteConfig())._line()
    assert isinstance(line, http.client.HTTPSConnection)
    context = vars(line)["_context"]
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname


def test_of_processes_that_share_out_a_model_one_asks() -> None:
    idle = dataclasses.replace(reader("http://localhost:1/v1", retries=0), asks=False)
    idle.check()
    assert [one.logprobs for one in idle.read([question(0), question(1)])] == [None, None]
    assert len(idle.think([Thought(question(0).messages, "", ("t",), 4)])) == 1 and not idle.counts


def test_the_check_asks_once_and_wants_log_probs() -> None:
    with serving(lambda body: chat_answer({"The": -0.1})) as server:
        reader(server.url).check()
        assert len(server.seen) == 1
    told = r"'m' at http://127.0.0.1:[0-9]+/v1 gave no log-probs; take a server"
    with serving(lambda body: HOSTILE[0]) as server, pytest.raises(ValueError, match=told):
        reader(server.url).check()
    with pytest.raises(ValueError, match=r"the judge cannot be asked: .*connection failed"):
        reader(server.url, retries=0).check()


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@host/v1", "https://hunter2@host/v1", "https://host/v1?key=hunter2", "http://host/#hunter2",
        "https://host:hunter2/v1", "https:///hunter2", "https://host/hunter2 v1", "https://host/hunter2\r\nX: y",
    ],
)  # fmt: skip
def test_a_url_that_may_hold_a_secret_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match="judge is a URL that cannot be used; allowed: https://HOST/v1") as refused:
        check_server(url)
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ValueError, match="cannot be used"):
        reader(url).read([question(0)])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"key_variable": "sk-planted"}, "key_variable is not the name of a variable"),
        ({"concurrency": 0}, "concurrency = 0 is not possible; allowed: 1 to 1024"),
        ({"retries": -1}, "retries = -1"),
        ({"timeout_seconds": 0.0}, "timeout_seconds = 0.0"),
        ({"backoff_seconds": math.inf}, "backoff_seconds = inf"),
        ({"top_logprobs": 1}, "top_logprobs = 1"),
        ({"style": "speech"}, "style = 'speech'"),
    ],
)  # fmt: skip
def test_settings_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        RemoteConfig(**settings)
    assert "sk-planted" not in str(refused.value)


def test_the_key_goes_into_the_header_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    echo = {"choices": [{"message": {"content": f"it is {KEY}"}, "finish_reason": "stop"}]}
    with serving(lambda body: echo) as server:
        judge = reader(server.url, key_variable="MY_KEY")
        said = judge.think([Thought(question(0).messages, "", ("t",), 4)])
        reader(server.url, key_variable="").think([Thought(question(0).messages, "", ("t",), 4)])
        (_, body, headers), (_, _, without) = server.seen
    assert headers["Authorization"] == f"Bearer {KEY}" and "Authorization" not in without
    assert said[0]["text"] == "it is [key]"
    assert KEY not in f"{judge!r} {judge.hash} {judge.counts} {body} {said}"
    assert judge.hash == f"{server.url} m (chat)"


@pytest.mark.parametrize("slash", ["/", "\\/", "\\u002F"])
def test_the_key_is_known_however_json_spells_it(slash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-planted/01+23")
    said = '{"error": {"message": "bad key sk-planted/01+23."}}'.replace("/", slash)
    with (
        serving(numbered, lambda body, attempt: (401, {}, said)) as server,
        pytest.raises(ConnectionError, match=r"bad key \[key\]\."),
    ):
        reader(server.url, key_variable="MY_KEY").read([question(0)])


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        ("http://judge.example/v1", KEY, "the key in MY_KEY would go to http://judge.example/v1 unencrypted"),
        ("https://judge.example/v1", f"{KEY}\nX: y", "the key in MY_KEY holds characters that no key has"),
        ("https://judge.example/v1", f"{KEY}é", "the key in MY_KEY holds characters that no key has"),
    ],
)
def test_a_key_that_cannot_be_sent(url: str, key: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ValueError, match=said) as refused:
        reader(url, key_variable="MY_KEY").read([question(0)])
    assert KEY not in str(refused.value)
