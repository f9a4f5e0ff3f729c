"""Preferences as the reward model and DPO train on them: two token sequences that begin alike, and a soft label."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from bylaw.kernels.philox import request_id, uniform_scalar
from bylaw.model.chat import check_messages
from bylaw.model.records import Record, decode_record, written_lines
from bylaw.model.sampler import Dialogue, answer_ids, turn
from bylaw.model.shared_prompt import Shared, common_length, pack_shared
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.formats import read_preferences


@dataclass(frozen=True)
class Pair:
    """Prompt and answer as token ids, twice, and the probability that the first is better."""

    a: list[int]
    b: list[int]
    p_a: float
    prompt: int = 0
    """How many tokens, at the start of both, are the prompt's. DPO has to know."""

    @property
    def longest(self) -> int:
        """Tokens of the longer text, which a model's context must hold."""
        return max(len(self.a), len(self.b))

    @cached_property
    def tokens(self) -> int:
        """What the pair adds to a packed stream: what both begin with is there once."""
        return len(self.a) + len(self.b) - common_length((self.a, self.b))


def split_pairs(
    preferences: Sequence[Record], tokenizer: Tokenizer, heldout_fraction: float, seed: int, context: int
) -> tuple[list[Pair], list[Pair], dict[str, int]]:
    """Training pairs, held-out pairs, counts. A prompt's pairs are on one side; abstained labels, and pairs longer than
    `context` tokens (counted as `over_context`), on neither.

    Raises ValueError when a side is empty.
    """
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    counts = {"abstained": 0, "over_context": 0}
    for preference in preferences:
        if preference["abstained"]:
            counts["abstained"] += 1
        elif (pair := pair_of(preference, tokenizer)).longest > context:
            counts["over_context"] += 1
        else:
            sides[is_heldout(preference["prompt_id"], heldout_fraction, seed)].append(pair)
    counts = {"train_pairs": len(sides[0]), "heldout_pairs": len(sides[1])} | counts
    if not sides[0] or not sides[1]:
        raise ValueError(
            f"training on preferences needs labelled pairs on both sides of heldout_fraction = {heldout_fraction}, and "
            f"of {len(preferences)} there are {len(sides[0])} to train on and {len(sides[1])} held out "
            f"({counts['abstained']} abstained, {counts['over_context']} longer than the model's context of {context} "
            "tokens). Give it more prompts; `bylaw trust` says why labels abstain"
        )
    return *sides, counts


def read_helpful(path: Path) -> list[Record]:
    """Preferences for helpful answers: our own records, or a TRL file (rlaif/formats.py), as the first line is.

    ValueError naming file and line for a record that lacks what training reads or has the id of another, and as TRL
    files raise.
    """
    first = next((decode_record(line, f"{path}:{n}") for n, line in written_lines(path)), {})
    if "p_a" not in first:
        return read_preferences(path).records
    records, lines = [], dict[str, int]()
    for number, line in written_lines(path):
        record = decode_record(line, f"{path}:{number}")
        _check_own(record, f"{path}:{number}")
        records.append(record)
        if lines.setdefault(record["id"], number) != number:
            raise ValueError(f"{path}:{number}: id {record['id']!r} is taken by line {lines[record['id']]}")
    return records


def _check_own(record: Record, where: str) -> None:
    p, abstained = record.get("p_a"), record.get("abstained")
    if not isinstance(record.get("id"), str) or not isinstance(abstained, str):
        raise ValueError(f"{where}: keys {sorted(record)!r:.120}; allowed: a preference of ours, with id and abstained")
    if not abstained and (isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1):
        raise ValueError(f"{where}: p_a = {p!r:.40}; allowed: a number from 0 to 1, or a reason in abstained")
    labels = record.get("labels", [])
    if not isinstance(record.get("by", {}), dict) or not isinstance(labels, list) or not all(map(_is_label, labels)):
        raise ValueError(f"{where}: by or labels are not those of a preference of ours; leave them out, or mend them")
    check_messages(record.get("prompt", ()), f"{where}: prompt")
    for side in "ab":
        answer = record.get(side)
        if not isinstance(answer, dict) or not _is_text(answer):
            raise ValueError(
                f"{where}: {side} = {answer!r:.80}; allowed: an answer with text and finish, and with the ids that "
                'were sampled, unless its finish is "given"'
            )


def _is_label(reading: object) -> bool:
    if not isinstance(reading, dict) or not {"principle", "p_a", "abstained", "weight"} <= reading.keys():
        return False
    principle = reading["principle"]
    return isinstance(principle, dict) and {"id", "hash"} <= principle.keys()


def _is_text(answer: Record) -> bool:
    known = isinstance(answer.get("text"), str) and isinstance(answer.get("finish"), str)
    ids = answer.get("ids")
    sampled = isinstance(ids, list) and all(type(id) is int and id >= 0 for id in ids)
    return known and (sampled or answer["finish"] == "given")


def draw_helpful(
    count: int, helpful: Sequence[Record], tokenizer: Tokenizer, ratio: float, seed: int, context: int
) -> tuple[list[Record], dict[str, int]]:
    """The helpfulness preferences that, behind `count` other training pairs, are a share `ratio` of all: drawn from
    `helpful` by the seed and their ids. Returns counts too: `helpful_pairs`, `helpful_over_context` drawn and left out
    as longer than `context` tokens, and `helpful_pairs_missing` where the file has fewer than that takes.
    """
    wanted = round(count * ratio / (1 - ratio))
    usable = [one for one in helpful if not one["abstained"]]
    usable.sort(key=lambda one: (uniform_scalar(seed, request_id("helpful pair", one["id"]), 0), one["id"]))
    drawn: list[Record] = []
    over = 0
    for one in usable:
        if len(drawn) == wanted:
            break
        if pair_of(one, tokenizer).longest > context:
            over += 1
        else:
            drawn.append(one)
    missing = wanted - len(drawn)
    return drawn, {"helpful_pairs": len(drawn), "helpful_over_context": over, "helpful_pairs_missing": missing}


def hardened(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with labels of 0 or 1, whichever is nearer; a half stays, as no answer is the better one."""
    return [replace(pair, p_a=0.5 if pair.p_a == 0.5 else float(pair.p_a > 0.5)) for pair in pairs]


def pair_of(preference: Record, tokenizer: Tokenizer) -> Pair:
    """The pair of a record whose label has not abstained."""
    prompt = tokenizer.prompt_ids(preference["prompt"])
    a, b = (_answered(preference["prompt"], prompt, preference[side], tokenizer) for side in "ab")
    return Pair(a, b, preference["p_a"], len(prompt))


def _answered(dialogue: Dialogue, prompt: list[int], answer: Record, tokenizer: Tokenizer) -> list[int]:
    """Ids of prompt and answer. A given answer, which nobody sampled, is read from its words, up to its stop token."""
    if answer["finish"] != "given":
        return prompt + answer_ids(answer, tokenizer)
    ids, learned = tokenizer.training_ids([*dialogue, turn("assistant", answer["text"])], last_only=True)
    return ids[: len(learned) - learned[::-1].index(True)]


def is_heldout(prompt_id: str, fraction: float, seed: int) -> bool:
    """Whether a prompt's pairs are kept for measuring: a function of the seed and the prompt's id."""
    return uniform_scalar(seed, request_id("heldout", prompt_id), 0) < fraction


def pack_pairs(pairs: Sequence[Pair], device: torch.device | str) -> Shared:
    """The stream of both answers to each prompt, a0, b0, a1, b1 ..."""
    return pack_shared([(pair.a, pair.b) for pair in pairs], device)
