"""Multiple-choice files: a judge that is a table of log-probs, the model's own scores, and files written by hand."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import tiny_llama, word_tokenizer

from bylaw.cli import main
from bylaw.model.checkpoint import save_model
from bylaw.model.engine import Engine
from bylaw.model.packing import pack
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer
from bylaw.rlaif.multiple_choice import Choice, ask_choices, describe_choices, measure_choices, read_choices

Write = Callable[..., Path]
HHH = {
    "prompt": "Which is kinder?\n\nOptions:\n (A) no\n (B) yes\n\nThe answer is:",
    "corrects": [" (B)"],
    "incorrects": [" (A)"],
    "text_correct": "yes",
    "text_incorrect": ["no"],
}
OWN = {"prompt": "Name a colour.", "options": ["soup", "red", "bread"], "answer": 1}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def made(*records: Any, name: str = "choices.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return made


def test_the_released_form_is_put_in_the_order_of_its_letters(write: Write) -> None:
    """Never the right one first: the place of an option would then tell."""
    (choice,) = read_choices(write(HHH))
    assert choice == Choice("1", HHH["prompt"], (" (A)", " (B)"), (1,))
    for letters in ("(b)", "(a)"), ("B:", "A:"):
        (choice,) = read_choices(write(HHH | dict(zip(("corrects", "incorrects"), letters, strict=True))))
        assert choice.options == letters[::-1] and choice.right == (1,)
    (choice,) = read_choices(write(HHH), by="texts")
    assert choice.options == (" no", " yes") and choice.right == (1,)


def test_own_questions_by_letters_and_by_texts(write: Write) -> None:
    (choice,) = read_choices(write(OWN | {"id": "q"}))
    listed = "Name a colour.\n\nOptions:\n(A) soup\n(B) red\n(C) bread\n\nThe answer is:"
    assert choice == Choice("q", listed, (" (A)", " (B)", " (C)"), (1,))
    (choice,) = read_choices(write(OWN), by="texts")
    assert choice == Choice("1", "Name a colour.", (" soup", " red", " bread"), (1,))


def test_big_bench_tasks_and_lines(write: Write) -> None:
    line = {"input": "Is snow white?\n", "target_scores": {"no": 0, "yes": 1, "as chalk": 1}}
    for path in (write(line), write({"name": "snow", "examples": [line]}, name="task.json")):
        (choice,) = read_choices(path, by="texts")
        assert (choice.options, choice.right) == (("no", "yes", "as chalk"), (1, 2))
    assert len(read_choices(write(line, line, line), limit=2)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "no prompt"),
        ({"answer": 3}, "answer = 3; allowed: 0 to 2"),
        ({"answer": True}, "answer = True"),
        ({"options": "red", "answer": 0}, "some right, not all"),
        ({"options": ["red", "red"], "answer": 0}, "different ones"),
        ({"options": [str(n) for n in range(27)]}, "27 options; allowed: at most 26"),
        ({"corrects": [3]}, r"corrects = \[3\]"),
        (
            {"corrects": "yes", "incorrects": "no"},
            r"\['yes', 'no'\] are no letters; allowed: ' \(A\)'",
        ),
        ({"corrects": "A", "incorrects": "B", "options": ["", ""]}, "no text_correct and text_incorrect"),
        ({"id": 1}, "id '1' is taken by .*choices.jsonl:1; every question needs one of its own"),
    ],
)
def test_what_is_no_question_is_refused_by_line(write: Write, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"choices\.jsonl:2: .*{message}"):
        texts = "options" in change and len(change["options"]) == 2
        read_choices(write(OWN, OWN | change), by="texts" if texts else "letters")


class TableJudge(Engine):
    """Log-probs by the letter token that an option holds."""

    table: dict[str, float]

    def score(self, queries: Sequence[Any], **_: Any) -> list[list[float]]:
        assert self.tokenizer is not None
        return [[self.table[self.tokenizer.decode(one).split()[-1]] for one in options] for _, options in queries]


def test_a_known_judge_is_measured_as_it_is(make_model: Callable[..., Transformer], tokenizer: Tokenizer) -> None:
    """It gives A 0.6 and B 0.2 whatever is asked, so it is right as often as A is: 1 of 4, at a sureness of 0.75."""
    judge = TableJudge(make_model(), tokenizer)
    judge.table = {"A": math.log(0.6), "B": math.log(0.2)}
    choices = [Choice(str(n), "which", (" A", " B"), (int(n > 0),)) for n in range(4)]
    found = measure_choices(ask_choices(judge, choices))
    assert (found["accuracy"], found["chance"], found["read"]) == (0.25, 0.5, 4)
    assert found["ece"] == pytest.approx(0.75 - 0.25)
    assert found["option_mass"]["mean"] == pytest.approx(0.8)
    assert found["positions"] == {"A": {"chosen": 1.0, "right": 0.25}, "B": {"chosen": 0.0, "right": 0.75}}
    assert "A         100.0%   25.0%" in describe_choices(found)


def test_a_judge_that_says_nothing_has_the_accuracy_of_chance(
    make_model: Callable[..., Transformer], tokenizer: Tokenizer
) -> None:
    judge = TableJudge(make_model(), tokenizer)
    judge.table = {"A": -1.0, "B": -1.0, "so": -1.0}
    found = measure_choices(ask_choices(judge, [Choice("1", "which", (" A", " B", " so"), (0,))]))
    assert found["accuracy"] == found["chance"] == pytest.approx(1 / 3) and found["ece"] == pytest.approx(0)


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_scores_are_sums_of_the_models_own_logprobs(style: Any, make_model: Any, tokenizer: Tokenizer) -> None:
    """Options of one and of three tokens, one of which begins the other; against the logits of the whole text."""
    model = make_model()
    choice = Choice("1", "w1 w2 which", (" A", " A good w3", " bad"), (0,))
    (answer,) = ask_choices(Engine(model, tokenizer), [choice], style, prefix=" so :" if style == "chat" else "")
    before = "w1 w2 which" if style == "plain" else "Human : w1 w2 which Assistant : so :"
    shared = len(tokenizer.encode(before))
    for option, tokens, logprob in zip(choice.options, answer["tokens"], answer["logprobs"], strict=True):
        ids = tokenizer.encode(before + option)
        with torch.no_grad():
            logits = model.logits(model(pack([ids])))
        every = torch.log_softmax(logits[:-1].double(), -1)[range(len(ids) - 1), ids[1:]]
        assert logprob == pytest.approx(float(every[shared - 1 :].sum()), abs=1e-4)
        assert tokens == len(ids) - shared
    scores = [score / n for score, n in zip(answer["logprobs"], answer["tokens"], strict=True)]
    assert measure_choices([answer])["accuracy_per_token"] == (scores[0] == max(scores))


def test_a_question_that_does_not_fit_is_counted_and_told(make_model: Any, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(context=16), tokenizer)
    answers = ask_choices(
        engine, [Choice("long", "w1 " * 20, (" A", " B"), (0,)), Choice("1", "w1", (" A", " B"), (0,))]
    )
    found = measure_choices(answers)
    assert (found["read"], found["abstained"]) == (1, {"question longer than the judge's context": 1})
    assert measure_choices(answers[:1])["accuracy"] is None and "0 answered" in describe_choices(
        measure_choices(answers[:1])
    )


def test_the_command_prints_measures_and_keeps_the_answers(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tiny_llama(), tmp_path / "m", word_tokenizer())
    path = write({"prompt": "which is better", "options": ["kind", "rude"], "answer": 0})
    main(["judge", str(tmp_path / "m"), str(path), "--by", "texts", "--json", "--out", str(tmp_path / "answers.jsonl")])
    found = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "answers.jsonl").read_text())
    assert found["accuracy"] == float(kept["p"][0] > 0.5) and kept["options"] == [" kind", " rude"]
