"""Preferences as the reward model and DPO train on them: two token sequences that begin alike, and a soft label."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from bylaw.kernels.philox import request_id, uniform_scalar
from bylaw.model.records import Record
from bylaw.model.sampler import answer_ids
from bylaw.model.shared_prompt import Shared, common_length, pack_shared
from bylaw.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pair:
    """Prompt and answer as token ids, twice, and the probability that the first is better."""

    a: list[int]
    b: list[int]
    p_a: float
    prompt: int = 0
    """How many tokens, at the start of both, are the prompt's. DPO has to know."""

    @cached_property
    def tokens(self) -> int:
        """What the pair adds to a packed stream: what both begin with is there once."""
        return len(self.a) + len(self.b) - common_length((self.a, self.b))


def split_pairs(
    preferences: Sequence[Record], tokenizer: Tokenizer, heldout_fraction: float, seed: int
) -> tuple[list[Pair], list[Pair], dict[str, int]]:
    """Training pairs, held-out pairs, counts. A prompt's pairs are on one side; abstained labels on neither.

    Raises ValueError when a side is empty.
    """
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    abstained = 0
    for preference in preferences:
        if preference["abstained"]:
            abstained += 1
            continue
        prompt = tokenizer.prompt_ids(preference["prompt"])
        a, b = (prompt + answer_ids(preference[side], tokenizer) for side in "ab")
        heldout = is_heldout(preference["prompt_id"], heldout_fraction, seed)
        sides[heldout].append(Pair(a, b, preference["p_a"], len(prompt)))
    counts = {"train_pairs": len(sides[0]), "heldout_pairs": len(sides[1]), "abstained": abstained}
    if not sides[0] or not sides[1]:
        raise ValueError(
            f"training on preferences needs labelled pairs on both sides of heldout_fraction = {heldout_fraction}; "
            f"there are {counts}. Give it more prompts, or look at why labels abstained in preferences.jsonl"
        )
    return *sides, counts


def is_heldout(prompt_id: str, fraction: float, seed: int) -> bool:
    """Whether a prompt's pairs are kept for measuring: a function of the seed and the prompt's id."""
    return uniform_scalar(seed, request_id("heldout", prompt_id), 0) < fraction


def pack_pairs(pairs: Sequence[Pair], device: torch.device | str) -> Shared:
    """The stream of both answers to each prompt, a0, b0, a1, b1 ..."""
    return pack_shared([(pair.a, pair.b) for pair in pairs], device)
