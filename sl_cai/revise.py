"""Critique and revision (Constitutional AI, arXiv 2212.08073, section 3).

    answer ~ model(prompt)
    for each round:  principle ~ constitution
                     critique ~ model(prompt, answer, critique request)
                     answer   ~ model(prompt, answer, critique request, critique, revision request)

Every round is kept. Unlike the paper's, the requests are turns of the dialogue, so that chat models and base models go
the same way; as in the paper, a round sees the answer of the round before it, and no earlier ones. The chains of many
prompts run together, each at its own pace, and what the model has said goes on in them as the token ids that it drew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bylaw.constitution.render import critique_request, revision_request
from bylaw.constitution.schema import Constitution, Principle, draw
from bylaw.kernels.philox import request_id, uniform_scalar
from bylaw.model.chunks import write_chunks
from bylaw.model.data import Prompt
from bylaw.model.engine import Script
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.records import Record
from bylaw.model.sampler import Sampler, Turn, said, turn
from bylaw.sl_cai.config import ReviseConfig


@dataclass(frozen=True, kw_only=True)
class Reviser:
    """A sampler, a constitution, and how to use them."""

    sampler: Sampler
    constitution: Constitution
    config: ReviseConfig

    def principle(self, prompt: Prompt, round: int) -> Principle:
        """The principle of one round of one prompt: a function of the seed, the prompt's id and the round."""
        u = uniform_scalar(self.sampler.seed, request_id("principle", prompt.id), round)
        return draw(self.constitution.for_stage("critique"), u)

    def requests(self, principle: Principle) -> tuple[Turn, Turn]:
        """The turns that ask for a critique and for a revision by `principle`."""
        critique, revision = (ask(self.constitution, principle) for ask in (critique_request, revision_request))
        return turn("user", critique), turn("user", revision)

    def reserve(self) -> int:
        """Tokens, at most, that the longest dialogue of a chain adds to its prompt: answer, critique, revision, the
        requests, and what the chat template writes around them.
        """
        config, count = self.config, self.sampler.tokenizer.prompt_ids
        first, spoken = turn("user", "x"), said({"text": "", "ids": []})
        frames = [
            len(count([first, spoken, critique, spoken, revision])) - len(count([first]))
            for critique, revision in map(self.requests, self.constitution.for_stage("critique"))
        ]
        answer = max(config.max_answer_tokens, config.max_revision_tokens)
        return answer + config.max_critique_tokens + config.max_revision_tokens + max(frames)


def revise(reviser: Reviser, prompts: Sequence[Prompt], path: Path, parallel: Parallel = ALONE) -> dict[str, int]:
    """Write one chain of answer, critiques and revisions per prompt to `path`; returns counts.

    Goes on where a killed run stopped. Raises ValueError, before any work, for a prompt that leaves too little context,
    and for a chat template in which sampled ids have no place (`Tokenizer.prompt_ids`).
    """
    config = reviser.config
    reviser.sampler.check_lengths(prompts, reviser.reserve())

    def work(chunk: Sequence[Prompt]) -> list[Record]:
        reviser.sampler.engine.forget()
        return reviser.sampler.engine.chain([_chain(reviser, prompt) for prompt in chunk])

    chains = write_chunks(path, prompts, config.prompts_per_chunk, work, "revise", parallel)
    return {"chains": chains, "rounds": config.rounds}


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
    for round in range(1, config.rounds + 1):
        principle = reviser.principle(prompt, round)
        ask_critique, ask_revision = reviser.requests(principle)
        dialogue = [*prompt.messages, said(answer), ask_critique]
        critique = yield from say(dialogue, ("critique", prompt.id, round), config.max_critique_tokens)
        dialogue += [said(critique), ask_revision]
        answer = yield from say(dialogue, ("revision", prompt.id, round), config.max_revision_tokens)
        named = {"id": principle.id, "hash": principle.hash}
        record["rounds"].append({"round": round, "principle": named, "critique": critique, "revision": answer})
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
