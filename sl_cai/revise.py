"""Critique and revision (Constitutional AI, arXiv 2212.08073, section 3).

    answer ~ model(prompt)
    for each round:  principle ~ constitution
                     critique ~ model(prompt, answer, critique request)
                     answer   ~ model(prompt, answer, critique request, critique, revision request)

Every round is kept. Unlike the paper's, the requests are turns of the dialogue, so that chat models and base models go
the same way; as in the paper, a round sees the answer of the round before it, and no earlier ones: the last that has
text, should a revision be empty. The chains of many prompts run together, each at its own pace, and what the model has
said goes on in them as the token ids that it drew, less what a guard has cut off (sl_cai/guards.py).

A round without a critique (`critiques = false`) asks for the revision straight away. Examples, if there are any, stand
before the dialogue of every critique and revision, the same in a whole chain; the first answer is the model's own, and
no example leads it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bylaw.constitution.examples import Examples, RevisionExample, before, check_shots, example_id, pick, revision_turns
from bylaw.constitution.render import critique_request, direct_request, revision_request
from bylaw.constitution.schema import Constitution, Principle, draw
from bylaw.kernels.philox import request_id, uniform_scalar
from bylaw.model.chunks import write_chunks
from bylaw.model.data import Prompt
from bylaw.model.engine import Script
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.records import Record, decode_record, numbered_lines
from bylaw.model.sampler import Sampler, Turn, said, turn
from bylaw.sl_cai.config import ReviseConfig
from bylaw.sl_cai.guards import count_marks, guard_critique, guard_revision


@dataclass(frozen=True, kw_only=True)
class Reviser:
    """A sampler, a constitution, how to use them, and the examples that `shots` are drawn from."""

    sampler: Sampler
    constitution: Constitution
    config: ReviseConfig
    examples: Examples = field(default_factory=Examples)

    def principle(self, prompt: Prompt, round: int) -> Principle:
        """The principle of one round of one prompt: a function of the seed, the prompt's id and the round."""
        return drawn_principle(self.constitution, self.sampler.seed, prompt.id, round)

    def requests(self, principle: Principle) -> list[Turn]:
        """The turns that ask by `principle`: for a critique and for a revision, or for a revision alone."""
        asks = (critique_request, revision_request) if self.config.critiques else (direct_request,)
        return [turn("user", ask(self.constitution, principle)) for ask in asks]

    def shots(self, prompt: Prompt) -> list[RevisionExample]:
        """The examples of a prompt's chain, in order: a function of the seed and the prompt's id."""

        def uniform(example: str, position: int) -> float:
            return uniform_scalar(self.sampler.seed, request_id("revise shots", prompt.id, example), position)

        return pick(self.examples.revisions, self.config.shots, uniform)

    def shown(self, examples: Sequence[RevisionExample]) -> list[Turn]:
        """Examples as turns of the dialogue."""
        return [t for one in examples for t in revision_turns(self.constitution, one, self.config.critiques)]

    def guarded(self, guard: Callable[..., Record], drawn: Record, answer: Record) -> Record:
        """What `guard` makes of a text drawn about `answer`."""
        if not self.config.guards:
            return drawn
        return guard(drawn, answer, self.sampler.tokenizer, self.config.max_repetition)

    def reserve(self) -> int:
        """Tokens, at most, that the longest dialogue of a chain adds to its prompt: examples, answer, critique,
        revision, the requests, and what the chat template writes around them. ValueError for more shots than examples.
        """
        config, count = self.config, self.sampler.tokenizer.prompt_ids
        check_shots(self.examples.revisions, config.shots, "revise.shots")
        first, spoken = turn("user", "x"), said({"text": "", "ids": []})
        alone = len(count([first]))
        frames = [
            len(count([first, *(t for ask in self.requests(principle) for t in (spoken, ask))])) - alone
            for principle in self.constitution.for_stage("critique")
        ]
        shots = sorted(len(count([*self.shown([one]), first])) - alone for one in self.examples.revisions)
        texts = config.max_critique_tokens * config.critiques + config.max_revision_tokens
        answer = max(config.max_answer_tokens, config.max_revision_tokens)
        return answer + texts + max(frames) + sum(shots[len(shots) - config.shots :])


def drawn_principle(constitution: Constitution, seed: int, prompt_id: str, round: int) -> Principle:
    """The principle that one round of a prompt's chain is criticised by."""
    known = constitution.for_stage("critique")
    us = [uniform_scalar(seed, request_id("principle", prompt_id, one.id), round) for one in known]
    return draw(known, us)[0]


def revise(reviser: Reviser, prompts: Sequence[Prompt], path: Path, parallel: Parallel = ALONE) -> dict[str, Any]:
    """Write one chain of answer, critiques and revisions per prompt to `path`; returns counts, also of the guards'
    marks.

    Goes on where a killed run stopped. Raises ValueError, before any work, for a prompt that leaves too little context,
    and for a chat template in which sampled ids have no place (`Tokenizer.prompt_ids`).
    """
    config = reviser.config
    reviser.sampler.check_lengths(prompts, reviser.reserve())

    def work(chunk: Sequence[Prompt]) -> list[Record]:
        reviser.sampler.engine.forget()
        return reviser.sampler.engine.chain([_chain(reviser, prompt) for prompt in chunk])

    chains = write_chunks(path, prompts, config.prompts_per_chunk, work, "revise", parallel)
    counts: dict[str, Any] = {"chains": chains, "rounds": config.rounds}
    if config.guards:
        lines = numbered_lines(path) if path.exists() else ()
        counts["marks"] = count_marks(decode_record(line, f"{path}:{number}") for number, line in lines)
    return counts


def sample_helpful(
    reviser: Reviser, prompts: Sequence[Prompt], path: Path, parallel: Parallel = ALONE
) -> dict[str, int]:
    """Write the helpful samples to `path`: a prompt's own answer if it brings one, else `helpful_samples` draws."""
    config = reviser.config
    jobs = [(p, n) for p in prompts for n in range(1 if p.answer else config.helpful_samples)]
    reviser.sampler.check_lengths([p for p in prompts if not p.answer], config.max_answer_tokens)

    def work(chunk: Sequence[tuple[Prompt, int]]) -> list[Record]:
        return _helpful(reviser, chunk)

    return {"helpful": write_chunks(path, jobs, config.prompts_per_chunk, work, "helpful", parallel)}


def _chain(reviser: Reviser, prompt: Prompt) -> Script[Record]:
    """The chain of one prompt, as a script for `Engine.chain`: the algorithm above, line by line."""
    config, say = reviser.config, reviser.sampler.say
    answer = yield from say(prompt.messages, ("answer", prompt.id), config.max_answer_tokens)
    by = reviser.sampler.provenance() | {"constitution": reviser.constitution.hash}
    record: Record = {"id": prompt.id, "prompt": prompt.messages, "answer": answer, "rounds": [], "by": by}
    shots = reviser.shots(prompt)
    if shots:
        record |= {"shots": [example_id(one) for one in shots], "by": by | {"examples": reviser.examples.hash}}
    opening = before(reviser.shown(shots), prompt.messages)
    for round in range(1, config.rounds + 1):
        principle = reviser.principle(prompt, round)
        named = {"id": principle.id, "hash": principle.hash}
        *ask_critique, ask_revision = reviser.requests(principle)
        dialogue, critique = [*opening, said(answer)], None
        if ask_critique:
            dialogue += ask_critique
            drawn = yield from say(dialogue, ("critique", prompt.id, round), config.max_critique_tokens)
            critique = reviser.guarded(guard_critique, drawn, answer)
            dialogue.append(said(critique))
        dialogue.append(ask_revision)
        drawn = yield from say(dialogue, ("revision", prompt.id, round), config.max_revision_tokens)
        revision = reviser.guarded(guard_revision, drawn, answer)
        record["rounds"].append({"round": round, "principle": named, "critique": critique, "revision": revision})
        answer = revision if revision["text"] else answer  # there is nothing in an empty one to go on from
    return record


def _helpful(reviser: Reviser, jobs: Sequence[tuple[Prompt, int]]) -> list[Record]:
    reviser.sampler.engine.forget()
    asked = [(prompt, n) for prompt, n in jobs if not prompt.answer]
    keys = [("helpful", prompt.id, n) for prompt, n in asked]
    drawn = reviser.sampler.turns([prompt.messages for prompt, _ in asked], keys, reviser.config.max_answer_tokens)
    fresh, by = iter(drawn), reviser.sampler.provenance()
    return [
        {"id": prompt.id, "sample": n, "prompt": prompt.messages, "by": by}
        | ({"given": prompt.answer} if prompt.answer else {"answer": next(fresh)})
        for prompt, n in jobs
    ]
