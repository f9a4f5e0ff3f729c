"""Critique and revision: which principle, which contexts, what is kept, and what a killed run leaves."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bylaw.constitution.examples import Examples, RevisionExample, example_id
from bylaw.constitution.schema import Constitution, Principle
from bylaw.kernels.philox import request_id, uniform_scalar
from bylaw.model.data import Prompt
from bylaw.model.engine import Completion, Engine, Request, Script
from bylaw.model.records import Record, read_records
from bylaw.model.sampler import Sampler, tokenizer_of
from bylaw.model.tokenizer import Tokenizer
from bylaw.sl_cai.config import ReviseConfig
from bylaw.sl_cai.revise import Reviser, revise, sample_helpful

SEED = 7
LIMITS = {"max_answer_tokens": 5, "max_critique_tokens": 4, "max_revision_tokens": 6}


class RecordingEngine(Engine):
    """An engine that keeps what it was asked for. With `replies`, it says these in turn instead of sampling."""

    asked: Sequence[Request] = ()
    replies: Sequence[list[int]] = ()

    def generate(self, requests: Sequence[Request], **settings: Any) -> list[Completion]:
        self.asked = [*self.asked, *requests]
        return super().generate(requests, **settings)

    def chain(self, scripts: Sequence[Script[Record]], **settings: Any) -> list[Record]:
        heard = [self._heard(script) for script in scripts]
        return [self._reply(script) for script in heard] if self.replies else super().chain(heard, **settings)

    def _heard(self, script: Script[Record]) -> Script[Record]:
        request = next(script)
        while True:
            assert isinstance(request, Request)
            self.asked = [*self.asked, request]
            try:
                request = script.send((yield request))
            except StopIteration as end:
                return end.value

    def _reply(self, script: Script[Record]) -> Record:
        next(script)
        while True:
            ids = self.replies[len(self.asked) - 1]
            ended = tokenizer_of(self).stop_ids[0] in ids
            try:
                script.send(Completion(ids=ids, logprobs=[0.0] * len(ids), finish="stop" if ended else "length"))
            except StopIteration as end:
                return end.value


MakeReviser = Callable[..., tuple[Reviser, RecordingEngine]]


@pytest.fixture
def make_reviser(make_model: Callable, tokenizer: Tokenizer, constitution: Constitution) -> MakeReviser:
    def make(context: int = 128, **settings: Any) -> tuple[Reviser, RecordingEngine]:
        config = ReviseConfig(**{**LIMITS, "rounds": 2, "prompts_per_chunk": 2, **settings})
        engine = RecordingEngine(make_model(context=context), tokenizer, config.max_rows)
        sampler = Sampler(engine=engine, settings=config, seed=SEED, model_hash="abc")
        return Reviser(sampler=sampler, constitution=constitution, config=config), engine

    return make


def ask(id: str, text: str, answer: str = "") -> Prompt:
    return Prompt(id, [{"role": "user", "content": text}], answer)


PROMPTS = [ask("p-0", "w1 w2"), ask("p-1", "w3"), ask("p-2", "w4 w5 w6")]


def drawn(constitution: Constitution, prompt_id: str, round: int) -> Principle:
    """The draw, by hand: the earlier of two arrivals, at rates of 1 and 3."""
    one, two = (uniform_scalar(SEED, request_id("principle", prompt_id, id), round) for id in ("one", "two"))
    return constitution.principles[0 if math.log(1 - one) / 1 > math.log(1 - two) / 3 else 1]


def test_principles_are_drawn_by_prompt_and_round_and_named_in_every_round(
    make_reviser: MakeReviser, constitution: Constitution, tmp_path: Path
) -> None:
    reviser, _ = make_reviser(rounds=4)
    assert revise(reviser, PROMPTS, tmp_path / "chains.jsonl") == {
        "chains": 3,
        "rounds": 4,
        "marks": {"critique": {}, "revision": {}},
    }
    chains = read_records(tmp_path / "chains.jsonl")
    assert [chain["id"] for chain in chains] == ["p-0", "p-1", "p-2"]
    for chain in chains:
        assert [step["round"] for step in chain["rounds"]] == [1, 2, 3, 4]
        for step in chain["rounds"]:
            principle = drawn(constitution, chain["id"], step["round"])
            assert step["principle"] == {"id": principle.id, "hash": principle.hash}
    ids = [reviser.principle(ask(str(n), "w0"), n % 4).id for n in range(1000)]
    assert ids == [drawn(constitution, str(n), n % 4).id for n in range(1000)]
    assert 200 < ids.count("one") < 300  # a weight of 1 in 4


def test_only_principles_of_the_critique_stage_are_drawn(make_reviser: MakeReviser, constitution: Constitution) -> None:
    reviser, _ = make_reviser()
    one, two = constitution.principles
    judged = Principle(id="two", title="two", statement="rule two", sources=two.sources, stages=("comparison",))
    split = Constitution(name="x", version="1", license="x", preamble="", principles=(one, judged))
    only = Reviser(sampler=reviser.sampler, constitution=split, config=reviser.config)
    assert {only.principle(ask(str(n), "w0"), 1).id for n in range(50)} == {"one"}


def spoken(tokenizer: Tokenizer, dialogue: Sequence[str]) -> list[int]:
    """The ids of turns of user and assistant, by hand: word-level, the plain template."""
    words = ""
    for n, text in enumerate(dialogue):
        words += f" Assistant : {text} </s>" if n % 2 else f" Human : {text}"
    return tokenizer.encode(words + " Assistant :")


def test_each_request_holds_the_prompt_the_latest_answer_and_the_request_and_no_more(
    make_reviser: MakeReviser, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    reviser, engine = make_reviser(prompts_per_chunk=1)
    texts = ["w10", "w11 w12", "w13", "w14", "w15 w16"]  # answer, critique, revision, critique, revision
    engine.replies = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    revise(reviser, PROMPTS[:1], tmp_path / "chains.jsonl")
    [chain] = read_records(tmp_path / "chains.jsonl")
    first, second = (step["principle"]["id"] for step in chain["rounds"])
    dialogues = [
        ["w1 w2"],
        ["w1 w2", "w10", f"check rule {first}"],
        ["w1 w2", "w10", f"check rule {first}", "w11 w12", f"fix rule {first}"],
        ["w1 w2", "w13", f"check rule {second}"],
        ["w1 w2", "w13", f"check rule {second}", "w14", f"fix rule {second}"],
    ]
    assert [list(request.prompt) for request in engine.asked] == [spoken(tokenizer, d) for d in dialogues]
    assert [request.max_tokens for request in engine.asked] == [5, 4, 6, 4, 6]
    keys = [("answer", "p-0"), *((name, "p-0", n) for n in (1, 2) for name in ("critique", "revision"))]
    assert [(r.seed, r.request) for r in engine.asked] == [(SEED, request_id(*key)) for key in keys]
    assert {request.temperature for request in engine.asked} == {1.0}  # the paper samples everything at 1
    assert all(request.stop_ids == tokenizer.stop_ids for request in engine.asked)
    said = [chain["answer"], *(step[name] for step in chain["rounds"] for name in ("critique", "revision"))]
    assert [one["text"] for one in said] == texts
    assert [one["ids"] for one in said] == engine.replies


def test_what_was_said_goes_on_as_the_ids_that_were_drawn(
    make_reviser: MakeReviser, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A token without text and a text that reads otherwise stay; each request begins with one before it and its ids,
    which is what their keys and values can be used again for.
    """
    reviser, engine = make_reviser(prompts_per_chunk=1)
    [unknown] = tokenizer.encode("<unk>")
    revised = [unknown, *tokenizer.encode("w5"), unknown, 0]
    engine.replies = [[unknown, *tokenizer.encode("w2 w3")], [0], revised, [0], tokenizer.encode("w4")]
    revise(reviser, PROMPTS[:1], tmp_path / "chains.jsonl")
    first, critique, revision, again, last = ([*request.prompt] for request in engine.asked)
    answer, said, _, said_again, _ = engine.replies
    for later, earlier, ids in (
        (critique, first, answer), (revision, critique, said), (again, first, revised), (last, again, said_again)
    ):  # fmt: skip
        assert later[: len(earlier + ids)] == earlier + ids
    assert critique[len(first + answer)] == 0 and revision[len(critique + said)] != 0  # a turn is closed, and once
    [chain] = read_records(tmp_path / "chains.jsonl")
    assert [step["critique"]["text"] for step in chain["rounds"]] == ["", ""]


def test_a_template_that_the_drawn_ids_have_no_place_in_is_refused_before_any_work(
    make_reviser: MakeReviser, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    reviser, engine = make_reviser()
    opens = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{{ 'so' if add_generation_prompt else '' }}"
    engine.tokenizer = Tokenizer.from_parts(tokenizer.backend, eos_token="</s>", chat_template=opens)
    with pytest.raises(ValueError, match="not prefix-stable"):
        revise(reviser, PROMPTS, tmp_path / "chains.jsonl")
    assert not engine.asked and not list(tmp_path.iterdir())


def test_a_model_that_says_nothing_makes_chains_all_the_same(
    make_reviser: MakeReviser, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    reviser, engine = make_reviser()
    engine.replies = [[tokenizer.eos_id]] * 20
    revise(reviser, PROMPTS, tmp_path / "chains.jsonl")
    for chain in read_records(tmp_path / "chains.jsonl"):
        assert [step["revision"]["text"] for step in chain["rounds"]] == ["", ""]


def test_a_chain_says_what_made_it(
    make_reviser: MakeReviser, constitution: Constitution, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    reviser, _ = make_reviser(top_k=3)
    revise(reviser, PROMPTS, tmp_path / "chains.jsonl")
    by = {
        "seed": SEED,
        "sampling": {"temperature": 1.0, "top_k": 3, "top_p": 1.0, "min_p": 0.0},
        "model": "abc",
        "tokenizer": tokenizer.hash,
        "constitution": constitution.hash,
    }
    assert [chain["by"] for chain in read_records(tmp_path / "chains.jsonl")] == [by] * 3


SHOTS = tuple(
    RevisionExample(prompt=f"w{n}", answer=f"bad w{n}", principle="one", critique=f"w{n} bad", revision="good")
    for n in (17, 18, 19)
)


def test_examples_stand_before_critiques_and_revisions_the_same_in_a_chain_and_drawn_anew_for_each_prompt(
    make_reviser: MakeReviser, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bare, engine = make_reviser(context=256, shots=2, prompts_per_chunk=1)
    reviser = dataclasses.replace(bare, examples=Examples(revisions=SHOTS))
    many = [ask(f"p-{n}", "w1 w2") for n in range(8)]
    revise(reviser, many, tmp_path / "chains.jsonl")
    asked = [list(request.prompt) for request in engine.asked]
    drawn = set()
    for n, chain in enumerate(read_records(tmp_path / "chains.jsonl")):
        answer, *others = asked[5 * n : 5 * n + 5]
        assert answer == spoken(tokenizer, ["w1 w2"])  # the model's own
        shots = [one for id in chain["shots"] for one in SHOTS if example_id(one) == id]
        turns = [t for one in shots for t in
                 (one.prompt, one.answer, "check rule one", one.critique, "fix rule one", one.revision)]  # fmt: skip
        prefix = spoken(tokenizer, [*turns, "w1 w2"])
        assert all(prompt[: len(prefix)] == prefix for prompt in others) and len(shots) == 2
        assert chain["by"]["examples"] == reviser.examples.hash
        drawn.add(tuple(chain["shots"]))
    assert len(drawn) >= 3
    spans = [len(prompt) - len(spoken(tokenizer, ["w1 w2"])) for prompt in asked]
    assert max(spans) + LIMITS["max_revision_tokens"] <= reviser.reserve() <= max(spans) + 6 + 3 * 6
    with pytest.raises(ValueError, match=r"revise.shots = 4, but there are 3"):
        dataclasses.replace(reviser, config=dataclasses.replace(reviser.config, shots=4)).reserve()


def test_a_round_without_a_critique_asks_for_the_revision_straight_away(
    make_reviser: MakeReviser, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    reviser, engine = make_reviser(context=256, critiques=False, prompts_per_chunk=1)
    engine.replies = [[*tokenizer.encode(text), 0] for text in ("w10", "w11", "w12")]
    counts = revise(reviser, PROMPTS[:1], tmp_path / "chains.jsonl")
    [chain] = read_records(tmp_path / "chains.jsonl")
    assert [(step["critique"], step["revision"]["text"]) for step in chain["rounds"]] == [(None, "w11"), (None, "w12")]
    statement = f"rule {chain['rounds'][1]['principle']['id']}"
    request = reviser.constitution.templates.direct.format(statement=statement)
    assert list(engine.asked[2].prompt) == spoken(tokenizer, ["w1 w2", "w11", request])
    assert engine.asked[2].request == request_id("revision", "p-0", 2)
    assert counts["marks"] == {"critique": {}, "revision": {}}
    assert reviser.reserve() < make_reviser(context=256)[0].reserve() + len(tokenizer.encode(request))


def test_guards_mark_and_count_and_can_be_left_out(
    make_reviser: MakeReviser, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = ["w10", "w10", "w10", "w13", "w14"]  # the answer in place of a critique, then given again as its revision
    for guards in (True, False):
        reviser, engine = make_reviser(guards=guards, prompts_per_chunk=1)
        engine.replies = [[*tokenizer.encode(text), 0] for text in texts]
        counts = revise(reviser, PROMPTS[:1], tmp_path / f"{guards}.jsonl")
        [chain] = read_records(tmp_path / f"{guards}.jsonl")
        marks = [[step[name].get("marks") for name in ("critique", "revision")] for step in chain["rounds"]]
        found = {"critique": {"answer": 1}, "revision": {"unchanged": 1}}
        assert marks == ([[["answer"], ["unchanged"]], [None, None]] if guards else [[None, None]] * 2)
        assert counts.get("marks") == (found if guards else None)


def cuts(whole: bytes, stride: int) -> list[int]:
    """Places to cut a file of lines: every `stride` bytes, and around the end of each line."""
    ends = [n + 1 for n, byte in enumerate(whole) if byte == 10]
    near = {end + shift for end in ends for shift in (-2, -1, 0, 1)}
    return sorted(place for place in near | set(range(0, len(whole), stride)) if 0 <= place <= len(whole))


@pytest.mark.parametrize("guards", [True, False])
def test_an_empty_revision_is_kept_and_the_next_round_goes_on_from_the_last_text(
    make_reviser: MakeReviser, tokenizer: Tokenizer, guards: bool, tmp_path: Path
) -> None:
    reviser, engine = make_reviser(rounds=3, guards=guards)
    say = tokenizer.encode
    engine.replies = [
        [*say("w11"), 0],
        [*say("w12"), 0],
        [0],
        [*say("w13"), 0],
        [*say("w14"), 0],
        [*say("w15"), 0],
        [0],
    ]
    revise(reviser, PROMPTS[:1], tmp_path / "chains.jsonl")
    [chain] = read_records(tmp_path / "chains.jsonl")
    assert [step["revision"]["text"] for step in chain["rounds"]] == ["", "w14", ""]
    assert chain["rounds"][0]["revision"].get("marks") == (["empty"] if guards else None)
    shown = [tokenizer.decode(list(request.prompt)).split() for request in engine.asked]
    assert all("w11" in words for words in shown[1:5]) and not any("w11" in words for words in shown[5:])
    assert all("w14" in words for words in shown[5:])


def test_a_file_cut_at_any_byte_is_completed_to_the_same_bytes(make_reviser: MakeReviser, tmp_path: Path) -> None:
    reviser, engine = make_reviser()
    path = tmp_path / "chains.jsonl"
    revise(reviser, PROMPTS, path)
    whole = path.read_bytes()
    assert len({tuple(r["answer"]["ids"]) for r in read_records(path)}) == 3  # a draw of its own for each prompt
    for cut in cuts(whole, stride=499):
        path.write_bytes(whole[:cut])
        revise(reviser, PROMPTS, path)
        assert path.read_bytes() == whole, f"cut at byte {cut} of {len(whole)}"
    engine.asked = []
    revise(reviser, PROMPTS, path)
    assert not engine.asked  # nothing is left to do


def test_another_chunk_size_or_batch_width_gives_the_same_chains(make_reviser: MakeReviser, tmp_path: Path) -> None:
    files = []
    for n, settings in enumerate(({}, {"prompts_per_chunk": 3}, {"max_rows": 1})):
        revise(make_reviser(**settings)[0], PROMPTS, tmp_path / f"{n}.jsonl")
        files.append((tmp_path / f"{n}.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]


def test_the_file_of_another_run_is_refused(make_reviser: MakeReviser, tmp_path: Path) -> None:
    reviser, _ = make_reviser()
    revise(reviser, PROMPTS, tmp_path / "chains.jsonl")
    with pytest.raises(ValueError, match="holds 3 records, but this stage makes 2"):
        revise(reviser, PROMPTS[:2], tmp_path / "chains.jsonl")


def test_a_prompt_that_leaves_too_little_context_is_refused_before_any_work(
    make_reviser: MakeReviser, tmp_path: Path
) -> None:
    reviser, engine = make_reviser()
    long = ask("p-long", "w1 " * 120)
    with pytest.raises(ValueError, match=r"'p-long' has 124 tokens.*context of 128"):
        revise(reviser, [*PROMPTS, long], tmp_path / "chains.jsonl")
    with pytest.raises(ValueError, match="'p-long'"):
        sample_helpful(reviser, [*PROMPTS, long], tmp_path / "helpful.jsonl")
    assert not engine.asked and not list(tmp_path.iterdir())


def test_a_prompt_of_the_greatest_length_leaves_room_for_texts_that_are_all_cut(
    make_reviser: MakeReviser, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Where a dialogue goes on after a cut text, the template ends the turn: that token needs room too."""
    reviser, engine = make_reviser(context=64)
    engine.replies = [tokenizer.encode("w0 " * limit) for limit in (5, 4, 6, 4, 6)]
    room = 64 - reviser.reserve()
    scaffold = len(spoken(tokenizer, [""]))
    revise(reviser, [ask("p", "w1 " * (room - scaffold))], tmp_path / "chains.jsonl")
    spans = [len(request.prompt) + request.max_tokens for request in engine.asked]
    assert max(spans) <= 64
    assert max(spans) >= 60  # and next to nothing is kept free in vain
    with pytest.raises(ValueError, match="'q'"):
        revise(reviser, [ask("q", "w1 " * (room - scaffold + 1))], tmp_path / "more.jsonl")


def helpful_records(reviser: Reviser, prompts: list[Prompt], path: Path) -> list[Record]:
    sample_helpful(reviser, prompts, path)
    return read_records(path)


def test_helpful_prompts_keep_their_own_answer_and_others_get_draws(
    make_reviser: MakeReviser, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    reviser, engine = make_reviser(helpful_samples=2)
    prompts = [ask("h-0", "w1", answer="  as it stands:\n€ "), ask("h-1", "w2"), ask("h-2", "w3", answer="w4")]
    records = helpful_records(reviser, prompts, tmp_path / "helpful.jsonl")
    assert [(r["id"], r["sample"], r.get("given")) for r in records] == [
        ("h-0", 0, "  as it stands:\n€ "),
        ("h-1", 0, None),
        ("h-1", 1, None),
        ("h-2", 0, "w4"),
    ]
    assert [list(request.prompt) for request in engine.asked] == [spoken(tokenizer, ["w2"])] * 2
    assert [request.request for request in engine.asked] == [request_id("helpful", "h-1", n) for n in (0, 1)]
    assert records[1]["answer"]["ids"] != records[2]["answer"]["ids"]
    assert all("answer" not in record for record in records if "given" in record)


def test_helpful_samples_cut_at_any_byte_are_completed_to_the_same_bytes(
    make_reviser: MakeReviser, tmp_path: Path
) -> None:
    reviser, _ = make_reviser(helpful_samples=2, prompts_per_chunk=3)
    path = tmp_path / "helpful.jsonl"
    prompts = [ask("h-0", "w1", answer="w2"), *PROMPTS]
    helpful_records(reviser, prompts, path)
    whole = path.read_bytes()
    for cut in cuts(whole, stride=499):
        path.write_bytes(whole[:cut])
        helpful_records(reviser, prompts, path)
        assert path.read_bytes() == whole, f"cut at byte {cut} of {len(whole)}"


def test_no_helpful_prompts_and_no_samples_are_both_possible(make_reviser: MakeReviser, tmp_path: Path) -> None:
    reviser, _ = make_reviser(helpful_samples=0)
    assert sample_helpful(reviser, [], tmp_path / "a.jsonl") == {"helpful": 0}
    assert sample_helpful(reviser, PROMPTS, tmp_path / "b.jsonl") == {"helpful": 0}
