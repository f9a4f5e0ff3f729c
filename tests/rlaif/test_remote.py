"""A judge behind HTTP: what it is asked, how its answers are read, and every fault that a server can have."""

import dataclasses
import http.client
import math
import ssl
from typing import Any

import pytest
from judge_server import (
    KEY,
    Body,
    chat_answer,
    completion_answer,
    number_of,
    numbered,
    numbered_readings,
    question,
    reader,
    serving,
)

from bylaw.model.sampler import turn
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.config import RemoteConfig, check_server
from bylaw.rlaif.reader import LocalReader, Question, Reading, Thought
from bylaw.rlaif.remote import NO_LETTER, NO_LOGPROBS, NO_NUMBER, letters
from bylaw.rlaif.remote_line import open_line

# How an answer is read.


def test_spellings_of_a_letter_are_added_up_and_no_others() -> None:
    listed = {" A": 0.2, "A": 0.1, "▁A": 0.04, "ĠA": 0.01, "a": 0.2, "(A": 0.1, "A.": 0.02, " B": 0.06, "B\n": 0.01}
    reading = letters(logs(listed))
    assert reading.logprobs == pytest.approx((math.log(0.35), math.log(0.07))) and not reading.bounded


def logs(listed: dict[str, float]) -> list[tuple[str, float]]:
    return [(token, math.log(p)) for token, p in listed.items()]


def read_listed(*listed: tuple[str, Any], **settings: Any) -> Reading:
    """What is made of a chat's answer with these tokens and log-probs at its first place."""
    top = [{"token": token, "logprob": p} for token, p in listed]
    answer = {"choices": [{"logprobs": {"content": [{"token": "x", "top_logprobs": top}]}}]}
    with serving(lambda body: answer) as server:
        [reading] = reader(server.url, **settings).read([question(0)])
    return reading


def test_two_tokens_that_are_spelled_alike_are_added_up_and_a_repeat_is_not() -> None:
    p, q, r = math.log(0.3), math.log(0.25), math.log(0.4)
    expected = pytest.approx((math.log(0.55), math.log(0.4)))
    assert read_listed(("A", p), ("A", q), ("B", r)).logprobs == expected
    assert read_listed(("A", p), ("A", q), ("B", r), ("A", p)).logprobs == expected  # the drawn one, listed twice


@pytest.mark.parametrize("never", [-math.inf, -1e6, -(10**30)])
def test_a_letter_without_probability_is_listed_all_the_same(never: float) -> None:
    reading = read_listed(("A", -0.1), ("B", never))
    assert reading == Reading((-0.1, -1e6)) and math.exp(-1e6) == 0
    assert read_listed(("A", never), ("B", never), ("x", -0.1)) == Reading(None, NO_LETTER)
    assert read_listed(("A", -0.1), ("x", never)) == Reading((-0.1, -1e6), bounded=True)  # what is last bounds it


@pytest.mark.parametrize("odd", [math.nan, "-0.1", None, False, 3.0, math.inf])
def test_a_letter_whose_log_prob_is_none_abstains(odd: Any) -> None:
    assert read_listed(("A", odd), ("B", -1.0), ("x", -1.5)) == Reading(None, NO_NUMBER)
    assert read_listed(("A", -0.5), ("B", -1.5), ("x", odd)) == Reading((-0.5, -1.5))


def test_what_rounding_leaves_above_0_is_a_log_prob() -> None:
    assert read_listed(("A", 1e-7), ("B", -17.0)) == Reading((1e-7, -17.0))


def test_a_drawn_token_that_is_listed_beside_the_likeliest_is_not_read() -> None:
    listed = [("A", -0.5), ("x", -1.5), ("B", -3.0)]
    assert read_listed(*listed, top_logprobs=3) == Reading((-0.5, -3.0))
    assert read_listed(*listed[::-1], top_logprobs=2) == read_listed(*listed[:2])


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
        reading = letters(logs({(token if one == "A" else one): p for one, p in listed.items()}))
        assert reading.bounded and reading.logprobs is not None
        assert reading.logprobs[at] == pytest.approx(math.log(bound))
        assert reading.logprobs[1 - at] == pytest.approx(math.log(listed["A"]))


def test_what_cannot_be_read_has_its_reason() -> None:
    assert letters([("a", -0.1), ("The", -2.0)]) == Reading(None, NO_LETTER)
    assert letters([]) == Reading(None, NO_LOGPROBS)


HOSTILE = [
    {"choices": [{"message": {"content": "A"}}]},
    {"choices": [{"logprobs": None}]},
    {"choices": [{"logprobs": {"content": []}}]},
    {"choices": [{"logprobs": {"content": [{"token": "A", "logprob": -0.1}]}}]},
    {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "x", "logprob": "-0.1"}]}]}}]},
    {"choices": [{"logprobs": {"top_logprobs": [{"x": float("nan"), "y": 3, "z": None}]}}]},
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
    assert all(0 <= body["seed"] < 2**31 for body in bodies)  # as much as servers take
    assert (
        said == [{"text": f"thought {n} ?", "ids": [], "finish": "stop" if n else "length"} for n in range(3)]
        and again == said[:1]
    )
    assert len({body["seed"] for body in bodies}) == 3 and repeated == bodies[0]
    assert all((body["max_tokens"], body["temperature"]) == (9, 0.5) for body in bodies)
    assert all(body["stop"][-1] == "so :" for body in bodies) and "logprobs" not in bodies[0]
    last = bodies[0]["messages"][-1]["content"] if style == "chat" else bodies[0]["prompt"]
    assert last.endswith("\nstep :" if style == "chat" else "question 0 ?\n\nAssistant: step :")


def test_no_more_stop_strings_than_servers_take() -> None:
    with serving(lambda body: chat_answer({"x": -0.1})) as server:
        reader(server.url).think([Thought(question(0).messages, "", ("t",), 4, 1.0, tuple("abcdef"))])
        assert server.seen[0][1]["stop"] == list("abcd")


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


# Before any work.


def test_certificates_are_verified() -> None:
    line = open_line("https://judge.example/v1", 1.0).connection
    assert isinstance(line, http.client.HTTPSConnection)
    context = vars(line)["_context"]
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname


def test_of_processes_that_share_out_a_model_one_asks() -> None:
    idle = dataclasses.replace(reader("http://localhost:1/v1", retries=0), asks=False)
    idle.check()
    assert [one.logprobs for one in idle.read([question(0), question(1)])] == [None, None]
    assert len(idle.think([Thought(question(0).messages, "", ("t",), 4)])) == 1 and not idle.counts


def test_the_check_asks_once_and_wants_log_probs() -> None:
    with serving(lambda body: chat_answer({"A": -0.1})) as server:
        reader(server.url).check()
        assert len(server.seen) == 1
    told = r"'m' at http://127.0.0.1:[0-9]+/v1 gave no log-probs; take a server"
    with serving(lambda body: HOSTILE[0]) as server, pytest.raises(ValueError, match=told):
        reader(server.url).check()
    for retries, tried in ((0, 1), (10, 2)):  # a wrong address is told in seconds
        with pytest.raises(ValueError, match=rf"the judge cannot be asked: .*failed {tried} time.*connection failed"):
            reader(server.url, retries=retries).check()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            chat_answer({"<think>": -0.1, "The": -5.0}),
            r"neither letter, .*think before .* judge_server.style than 'chat'",
        ),
        (chat_answer({"A": math.nan, "B": -1.0}), "cannot be asked a plain question: a letter's log-prob is no number"),
        (chat_answer({}, "", "content_filter"), "cannot be asked a plain question: refused by the server's content"),
    ],
)
def test_the_check_refuses_a_server_that_names_no_letter(answer: Body, said: str) -> None:
    with serving(lambda body: answer) as server, pytest.raises(ValueError, match=said):
        reader(server.url).check()


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
    assert judge.hash == f"{server.url} m (chat, 20 log-probs)"


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
