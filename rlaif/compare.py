"""Two answers to each prompt from the SL-CAI model, for a judge to compare (arXiv 2212.08073, section 4.1)."""

from collections.abc import Sequence
from pathlib import Path

from bylaw.model.chunks import write_chunks
from bylaw.model.data import Prompt
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.records import Record
from bylaw.model.sampler import Sampler
from bylaw.rlaif.config import CompareConfig


def compare(
    sampler: Sampler, prompts: Sequence[Prompt], path: Path, config: CompareConfig, parallel: Parallel = ALONE
) -> dict[str, int]:
    """Write `pairs_per_prompt` pairs of answers for each prompt to `path`; returns counts.

    Goes on where a killed run stopped. Raises ValueError, before any work, for a prompt that leaves too little context.
    """
    sampler.check_lengths(prompts, config.max_tokens)
    jobs = [(prompt, n) for prompt in prompts for n in range(config.pairs_per_prompt)]

    def work(chunk: Sequence[tuple[Prompt, int]]) -> list[Record]:
        return _pairs(sampler, chunk, config.max_tokens)

    return {"pairs": write_chunks(path, jobs, config.prompts_per_chunk, work, "compare", parallel)}


def _pairs(sampler: Sampler, jobs: Sequence[tuple[Prompt, int]], limit: int) -> list[Record]:
    sampler.engine.forget()
    sides = [(prompt, n, side) for prompt, n in jobs for side in "ab"]
    keys = [("pair", prompt.id, n, side) for prompt, n, side in sides]
    answers = sampler.turns([prompt.messages for prompt, _, _ in sides], keys, limit)
    by = sampler.provenance()
    return [
        {"id": f"{prompt.id}#{n}", "prompt_id": prompt.id, "prompt": prompt.messages, "a": a, "b": b, "by": by}
        for (prompt, n), a, b in zip(jobs, answers[::2], answers[1::2], strict=True)
    ]
