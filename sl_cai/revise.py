"""Critique and revision (Constitutional AI, arXiv 2212.08073, section 3).

    answer ~ model(prompt)
    for each round:  principle ~ constitution
                     critique ~ model(prompt, answer, critique request)
                     answer   ~ model(prompt, answer, critique request, critique, revision request)

Every round is kept. Unlike the paper's, the requests are turns of the dialogue, so that chat models and base models go
the same way; as in the paper, a round sees the answer of the round before it, and no earlier ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bylaw.constitution.render import critique_request, revision_request
from bylaw.constitution.schema import Constitution, Principle, draw
from bylaw.kernels.philox import request_id, uniform_scalar
from bylaw.model.chunks import write_chunks
from bylaw.model.data import Prompt
from bylaw.model.records import Record
from bylaw.model.sampler import Sampler, turn
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

    def requests(self, principle: Principle) -> tuple[dict[str, str], dict[str, str]]:
        """The turns that ask for a critique and for a revision by `principle`."""
        critique, revision = (ask(self.constitution, principle) for ask in (critique_request, revision_request))
        return turn("user", critique), turn("user", revision)

    def reserve(self) -> int:
        """Tokens, at most, that the longest dialogue of a chain adds to its prompt: answer, critique, revision, the
        requests, and what the chat template writes around them.
        """
        config, count = self.config, self.sampler.tokenizer.prompt_ids
        first, said = turn("user", "x"), turn("assistant", "x")
        frames = [
            len(count([first, said, critique, said, revision])) - len(count([first]))
            for critique, revision in map(self.requests, self.constitution.for_stage("critique"))
        ]
        answer = max(config.max_answer_tokens, config.max_revision_tokens)
        return answer + config.max_critique_tokens + config.max_revision_tokens + max(frames)


def revise(reviser: Reviser, prompts: Sequence[Prompt], path: Path) -> dict[str, int]:
    """Write one chain of answer, critiques and revisions per prompt to `path`; returns counts.

    Goes on where a killed run stopped. Raises ValueError, before any work, for a prompt that leaves too little context.
    """
    config = reviser.config
    reviser.sampler.check_lengths(prompts, reviser.reserve())
    chains = write_chunks(path, prompts, config.prompts_per_chunk, lambda chunk: _chains(reviser, chunk), "revise")
    return {"chains": chains, "rounds": config.rounds}


def sample_helpful(reviser: Reviser, prompts: Sequence[Prompt], path: Path) -> dict[str, int]:
    """Write the helpful samples to `path`: a prompt's own answer if it brings one, else `helpful_samples` draws."""
    config = reviser.config
    jobs = [(p, n) for p in prompts for n in range(1 if p.answer else config.helpful_samples)]
    reviser.sampler.check_lengths([p for p in prompts if not p.answer], config.max_answer_tokens)
    samples = write_chunks(path, jobs, config.prompts_per_chunk, lambda chunk: _helpful(reviser, chunk), "helpful")
    return {"helpful": samples}


def _chains(reviser: Reviser, prompts: Sequence[Prompt]) -> list[Record]:
    keys = [("answer", prompt.id) for prompt in prompts]
    answers = reviser.sampler.turns([p.messages for p in prompts], keys, reviser.config.max_answer_tokens)
    by = reviser.sampler.provenance() | {"constitution": reviser.constitution.hash}
    records: list[Record] = [
        {"id": p.id, "prompt": p.messages, "answer": answer, "rounds": [], "by": by}
        for p, answer in zip(prompts, answers, strict=True)
    ]
    for round in range(1, reviser.config.rounds + 1):
        steps = _round(reviser, prompts, answers, round)
        for record, step in zip(records, steps, strict=True):
            record["rounds"].append(step)
        answers = [step["revision"] for step in steps]
    return records


def _round(
    reviser: Reviser, prompts: Sequence[Prompt], answers: list[dict[str, Any]], round: int
) -> list[dict[str, Any]]:
    """One critique and one revision of each prompt's answer, by a principle of its own."""
    config, sampler = reviser.config, reviser.sampler
    principles = [reviser.principle(prompt, round) for prompt in prompts]
    asks = [reviser.requests(principle) for principle in principles]
    dialogues = [
        [*prompt.messages, turn("assistant", answer["text"]), critique]
        for prompt, answer, (critique, _) in zip(prompts, answers, asks, strict=True)
    ]
    critiques = sampler.turns(dialogues, [("critique", p.id, round) for p in prompts], config.max_critique_tokens)
    dialogues = [
        [*dialogue, turn("assistant", critique["text"]), revision]
        for dialogue, critique, (_, revision) in zip(dialogues, critiques, asks, strict=True)
    ]
    revisions = sampler.turns(dialogues, [("revision", p.id, round) for p in prompts], config.max_revision_tokens)
    return [
        {"round": round, "principle": {"id": p.id, "hash": p.hash}, "critique": critique, "revision": revision}
        for p, critique, revision in zip(principles, critiques, revisions, strict=True)
    ]


def _helpful(reviser: Reviser, jobs: Sequence[tuple[Prompt, int]]) -> list[Record]:
    asked = [(prompt, n) for prompt, n in jobs if not prompt.answer]
    keys = [("helpful", prompt.id, n) for prompt, n in asked]
    drawn = reviser.sampler.turns([prompt.messages for prompt, _ in asked], keys, reviser.config.max_answer_tokens)
    fresh, by = iter(drawn), reviser.sampler.provenance()
    return [
        {"id": prompt.id, "sample": n, "prompt": prompt.messages, "by": by}
        | ({"given": prompt.answer} if prompt.answer else {"answer": next(fresh)})
        for prompt, n in jobs
    ]
