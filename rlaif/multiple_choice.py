"""A judge on multiple-choice files, whose right answers are known: accuracy, calibration, option mass, position.

Each option's log-prob after the prompt, summed over its tokens, is its score; normalised over the options, the scores
are the judge's probabilities. Questions are put by letters, or by the whole texts of the options. Lines of a file:

  {"prompt", "corrects": [" (B)"], "incorrects": [" (A)"], "text_correct", "text_incorrect"}   the paper's 438 questions
     on helpfulness, honesty and harm (arXiv 2212.08073, section 2): the prompt lists the options already
  {"prompt", "options": [texts], "answer": n}                                                  n counts from 0
  {"input", "target_scores": {text: 1 if right else 0}}                                        BIG-bench
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bylaw.model.engine import Engine
from bylaw.model.records import Record, decode_record, written_lines
from bylaw.model.sampler import tokenizer_of, turn
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.reader import TOO_LONG, Question, Reader
from bylaw.rlaif.trust import LITTLE, calibration, spread, wilson

By = Literal["letters", "texts"]
Style = Literal["plain", "chat"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = re.compile(r"\s*\(?([A-Za-z])\)?[.:]?\s*")
_FORMS = "{prompt, corrects, incorrects}, {prompt, options, answer} or {input, target_scores}"


@dataclass(frozen=True)
class Choice:
    """A question as it is put: the options follow the prompt, and `right` are the places of those that are right."""

    id: str
    prompt: str
    options: tuple[str, ...]
    right: tuple[int, ...]


def read_choices(path: Path, by: By = "letters", limit: int = 0) -> list[Choice]:
    """The questions of a JSONL file, or of a BIG-bench task (.json with "examples"), put by letters or by texts; at
    most the first `limit`, 0 for all.

    Raises FileNotFoundError, and ValueError naming file and line for what is no question, has no option that is right
    or none that is wrong, or has no texts to be put by.
    """
    lines = _examples(path) if path.suffix == ".json" else _lines(path)
    found, places = [], dict[str, str]()
    for number, where, record in lines[: limit or None]:
        found.append(_choice(record, where, number, by))
        if (taken := places.setdefault(found[-1].id, where)) != where:
            raise ValueError(f"{where}: id {found[-1].id!r} is taken by {taken}; every question needs one of its own")
    if not found:
        raise ValueError(f"{path}: no questions; allowed: one a line, as {_FORMS}")
    return found


def ask_choices(
    engine: Engine, choices: Sequence[Choice], style: Style = "plain", prefix: str = "", progress: str | None = None
) -> list[Record]:
    """The judge's answer to each question: log-probs and token counts of its options, or why it has none.

    "plain" gives the prompt as a text to continue; "chat" as a user's turn, with `prefix` as the reply's beginning.
    """
    ids = _chat(tokenizer_of(engine), prefix) if style == "chat" else _plain(tokenizer_of(engine), prefix)
    queries = [_query(choice, ids) for choice in choices]
    answers: list[Any] = engine.score(queries, progress=progress, on_error="return")
    return [
        _answer(choice, [len(one) for one in query[1]], answer)
        for choice, query, answer in zip(choices, queries, answers, strict=True)
    ]


def ask_letters(reader: Reader, choices: Sequence[Choice], prefix: str) -> list[Record]:
    """The answers of a judge that tells the letters A and B alone, such as one behind a server, to questions of two
    options put by letters; `prefix` is how its reply begins, up to the letter.

    Raises ValueError, before any question, for one with other options.
    """
    for one in choices:
        if [_LETTER.fullmatch(option) and option.strip(" ().") for option in one.options] != ["A", "B"]:
            raise ValueError(
                f"question {one.id!r} has the options {list(one.options)!r:.100}; a server is asked for A and B alone"
            )
    readings = reader.read([Question([turn("user", one.prompt.strip())], prefix) for one in choices])
    answers: list[Any] = [list(one.logprobs) if one.logprobs else one.why for one in readings]
    return [_answer(choice, [1, 1], answer) for choice, answer in zip(choices, answers, strict=True)]


def measure_choices(answers: Sequence[Record]) -> dict[str, Any]:
    """Accuracy and its kin over the answers of `ask_choices` that were read; the others are counted by reason.

    Options that tie for the best share the answer, so that a judge that says nothing has the accuracy of chance. "ece"
    and "reliability" compare the probability of the chosen option with whether it is right (arXiv 1706.04599).
    "positions" has, by place, how often the option there is chosen and how often it is right: a judge that likes the
    first letter chooses it more often than it is right. "interval" is that of the accuracy, of 95 %, with the questions
    as trials. "accuracy_per_token" divides each score by its tokens first, which is fairer to long texts. Measures are
    None without any answer.
    """
    read = [one for one in answers if not one["abstained"]]
    reasons = [one["abstained"] for one in answers if one["abstained"]]
    found: dict[str, Any] = {
        "questions": len(answers),
        "read": len(read),
        "abstained": {why: reasons.count(why) for why in sorted(set(reasons))},
    }
    if not read:
        return found | dict.fromkeys(("accuracy", "interval", "accuracy_per_token", "chance", "ece", "option_mass"))
    credits = [_credit(one, one["logprobs"]) for one in read]
    per_token = [
        _credit(one, [score / n for score, n in zip(one["logprobs"], one["tokens"], strict=True)]) for one in read
    ]
    sure = [max(_shares(one["logprobs"])) for one in read]
    known = calibration(sure, credits)
    masses = [math.fsum(map(math.exp, one["logprobs"])) for one in read]
    return found | {
        "accuracy": sum(credits) / len(read),
        "interval": wilson(sum(credits) / len(read), len(read)),
        "accuracy_per_token": sum(per_token) / len(read),
        "chance": sum(len(one["right"]) / len(one["logprobs"]) for one in read) / len(read),
        "ece": known["ece"],
        "reliability": known["reliability"],
        "option_mass": spread(masses, 0.0, 1.0),
        "positions": _positions(read),
    }


def describe_choices(found: dict[str, Any]) -> str:
    """The measures as a person reads them."""
    count = found["questions"]
    lines = [f"{count} question{'' if count == 1 else 's'}, {found['read']} answered"]
    lines += [f"  not answered, {count}: {why}" for why, count in found["abstained"].items()]
    if not found["read"]:
        return "\n".join(lines)
    for name in ("accuracy", "accuracy_per_token", "chance", "ece"):
        between = f"  ({found['interval'][0]:.1%} to {found['interval'][1]:.1%})" if name == "accuracy" else ""
        lines.append(f"{name.replace('_', ' '):<20}{found[name]:>7.1%}{between}")
    lines.append(f"{'option mass':<20}{found['option_mass']['mean']:>7.1%}")
    if found.get("by") == "letters" and found["option_mass"]["mean"] < LITTLE:
        lines.append("The judge would rather go on otherwise than with a letter: look at --style and --prefix.")
    lines += ["", f"{'option':<8}{'chosen':>8}{'right':>8}"]
    for place, row in found["positions"].items():
        lines.append(f"{place:<8}{row['chosen']:>8.1%}{row['right']:>8.1%}")
    lines += ["", f"{'sure from':<10}{'questions':>10}{'sure':>8}{'right':>8}"]
    for row in found["reliability"]:
        lines.append(f"{row['from']:<10.1f}{row['pairs']:>10}{row['predicted']:>8.1%}{row['label']:>8.1%}")
    return "\n".join(lines)


def _lines(path: Path) -> list[tuple[int, str, Record]]:
    numbered = ((number, f"{path}:{number}", line) for number, line in written_lines(path))
    return [(number, where, decode_record(line, where)) for number, where, line in numbered]


def _examples(path: Path) -> list[tuple[int, str, Record]]:
    examples = decode_record(path.read_bytes(), str(path)).get("examples")
    if not isinstance(examples, list) or not all(isinstance(one, dict) for one in examples):
        raise ValueError(f'{path}: no list of "examples"; allowed: a BIG-bench task, or a .jsonl file')
    return [(number, f"{path}, example {number}", one) for number, one in enumerate(examples, 1)]


def _choice(record: Record, where: str, number: int, by: By) -> Choice:
    prompt = record.get("prompt", record.get("input"))
    if not {"corrects", "options", "target_scores"} & record.keys():
        raise ValueError(f"{where}: keys {sorted(record)} are no question's; allowed: {_FORMS}")
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"{where}: no prompt; allowed: {_FORMS}")
    if "corrects" in record:
        prompt, options, right = _released(record, prompt, where, by)
    else:
        texts, right = _texts(record, where)
        prompt, options = _lettered(prompt, texts, where) if by == "letters" else (prompt, _after(prompt, texts))
    if len(set(options)) < len(options) or not 0 < len(right) < len(options):
        raise ValueError(
            f"{where}: options {options!r:.200}, right {right}; allowed: different ones, some right, not all"
        )
    return Choice(str(record.get("id", number)), prompt, tuple(options), tuple(right))


def _released(record: Record, prompt: str, where: str, by: By) -> tuple[str, list[str], list[int]]:
    """Options in the order of their letters, where they are letters: right ones first would tell a position apart."""
    names = ("corrects", "incorrects") if by == "letters" else ("text_correct", "text_incorrect")
    if by == "texts" and not all(record.get(name) for name in names):
        raise ValueError(f"{where}: no text_correct and text_incorrect; they are what is scored by texts")
    right, wrong = (_strings(record, name, where) for name in names)
    options = [*right, *wrong]
    letters = _strings(record, "corrects", where) + _strings(record, "incorrects", where)
    marks = [_LETTER.fullmatch(letter) for letter in letters]
    order = list(range(len(options)))
    if by == "letters" and not all(marks):
        raise ValueError(
            f"{where}: corrects and incorrects = {letters!r:.100} are no letters; allowed: ' (A)' and on, or --by "
            "texts with the options in text_correct and text_incorrect"
        )
    if all(marks) and len(letters) == len(options):
        order.sort(key=lambda i: letters[i].strip())
    places = [place for place, i in enumerate(order) if i < len(right)]
    texts = [options[i] for i in order]
    return prompt, texts if by == "letters" else _after(prompt, texts), places


def _strings(record: Record, name: str, where: str) -> list[str]:
    value = record.get(name)
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(one, str) and one for one in found):
        raise ValueError(f"{where}: {name} = {value!r:.80}; allowed: a text, or a list of texts")
    return found


def _texts(record: Record, where: str) -> tuple[list[str], list[int]]:
    if isinstance(scores := record.get("target_scores"), dict):
        if not all(scores) or not all(isinstance(score, int | float) for score in scores.values()):
            raise ValueError(f"{where}: target_scores = {scores!r:.80}; allowed: a number for each text, none empty")
        return list(scores), [place for place, score in enumerate(scores.values()) if score == max(scores.values())]
    options, answer = _strings(record, "options", where), record.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
        raise ValueError(
            f"{where}: answer = {answer!r:.40}; allowed: 0 to {len(options) - 1}, the right option's place"
        )
    return options, [answer]


def _lettered(prompt: str, texts: Sequence[str], where: str) -> tuple[str, list[str]]:
    if len(texts) > len(LETTERS):
        raise ValueError(f"{where}: {len(texts)} options; allowed: at most {len(LETTERS)} by letters; put it by texts")
    listed = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, texts, strict=False))
    return f"{prompt}\n\nOptions:\n{listed}\n\nThe answer is:", [f" ({letter})" for letter in LETTERS[: len(texts)]]


def _after(prompt: str, texts: Sequence[str]) -> list[str]:
    """The texts as they follow the prompt, a space between where there is no white space."""
    return [text if prompt[-1].isspace() or text[0].isspace() else f" {text}" for text in texts]


def _plain(tokenizer: Tokenizer, prefix: str) -> Callable[[str, str], list[int]]:
    start = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    return lambda prompt, option: start + tokenizer.encode(prompt + prefix + option)


def _chat(tokenizer: Tokenizer, prefix: str) -> Callable[[str, str], list[int]]:
    return lambda prompt, option: tokenizer.prompt_ids([turn("user", prompt.strip())], prefix=prefix + option)


def _query(choice: Choice, ids: Callable[[str, str], list[int]]) -> tuple[list[int], list[list[int]]]:
    """What all options begin with, and how each goes on. The text is encoded as one, as models learnt it: where an
    option takes the prompt's last token into one of its own, that token is scored with it.
    """
    whole = [ids(choice.prompt, option) for option in choice.options]
    texts = [*whole, ids(choice.prompt, "")]
    most = min(len(one) for one in whole) - 1  # a token is left of each, even of one that begins another
    shared = next((n for n in range(most) if len({tuple(one[n : n + 1]) for one in texts}) > 1), most)
    return whole[0][:shared], [one[shared:] for one in whole]


def _answer(choice: Choice, tokens: list[int], answer: list[float] | ValueError | str) -> Record:
    """`answer`: the log-probs of the options, or why there are none."""
    kept: Record = {"id": choice.id, "prompt": choice.prompt, "options": list(choice.options)}
    kept |= {"right": list(choice.right), "tokens": tokens}
    if isinstance(answer, ValueError | str):
        why = answer if isinstance(answer, str) else TOO_LONG
        return kept | {"logprobs": None, "p": None, "abstained": why}
    return kept | {"logprobs": answer, "p": _shares(answer), "abstained": ""}


def _shares(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / math.fsum(powers) for power in powers]


def _best(scores: Sequence[float]) -> list[int]:
    return [place for place, score in enumerate(scores) if score == max(scores)]


def _credit(answer: Record, scores: Sequence[float]) -> float:
    """1 where the best option is right, 0 where it is wrong, a share where several tie."""
    best = _best(scores)
    return sum(place in answer["right"] for place in best) / len(best)


def _positions(read: Sequence[Record]) -> dict[str, dict[str, float]]:
    """By letter of the place: shares of the questions that have it."""
    rows: dict[str, dict[str, float]] = {}
    for place in range(max(len(one["logprobs"]) for one in read)):
        having = [one for one in read if place < len(one["logprobs"])]
        chosen = sum((place in best) / len(best) for best in (_best(one["logprobs"]) for one in having))
        right = sum((place in one["right"]) / len(one["right"]) for one in having)
        name = LETTERS[place] if place < len(LETTERS) else str(place + 1)
        rows[name] = {"chosen": chosen / len(having), "right": right / len(having)}
    return rows
