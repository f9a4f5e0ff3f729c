"""Relabelling asks what an amendment can have changed, nothing else, and comes to what a full labelling comes to."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from bylaw.constitution import Constitution, Principle, Templates
from bylaw.model.records import Record, read_records
from bylaw.rlaif.config import LabelConfig
from bylaw.rlaif.judge import Judge
from bylaw.rlaif.label import label
from bylaw.rlaif.reader import Question, Reading, Thought
from bylaw.rlaif.relabel import flips, relabel, side


@dataclass
class Whim:
    """Says of each question what a hash of its words says, and counts what it is asked."""

    asked: list[str] = field(default_factory=list)
    hash: str = "whim"

    def check(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def read(self, asked: Sequence[Question]) -> list[Reading]:
        self.asked += [str(one) for one in asked]
        digests = [hashlib.sha256(str(one).encode()).digest() for one in asked]
        return [Reading((-0.1 - d[0] / 99, -0.1 - d[1] / 99)) for d in digests]

    def think(self, asked: Sequence[Thought]) -> list[dict[str, Any]]:
        words = [hashlib.sha256(str((one.messages, one.prefix, one.key)).encode()).hexdigest() for one in asked]
        return [{"text": word[:6], "ids": [1], "finish": "stop"} for word in words]


def principle(id: str, weight: float = 1.0, **changes: Any) -> Principle:
    return Principle(
        **{"id": id, "title": id, "statement": f"Keep {id}.", "sources": ("s",), "weight": weight} | changes
    )


def constitution(*principles: Principle, **templates: str) -> Constitution:
    return Constitution(
        name="c", version="1", license="x", preamble="p", principles=principles, templates=Templates(**templates)
    )


FOUR = [principle("a"), principle("b", 2.0), principle("c", 0.5), principle("d")]
BEFORE = constitution(*FOUR)
REWORDED = replace(FOUR[1], statement="Keep b better.")
AMENDED = {
    "removed": constitution(FOUR[0], *FOUR[2:]),
    "reworded": constitution(FOUR[0], REWORDED, *FOUR[2:]),
    "added": constitution(*FOUR, principle("e", 3.0)),
    "re-weighted": constitution(replace(FOUR[0], weight=4.0), *FOUR[1:]),
    "source only": constitution(replace(FOUR[0], sources=("other",)), *FOUR[1:]),
    "template": constitution(*FOUR, question="Which is nearer to this? {statement}"),
    "out of comparisons": constitution(replace(FOUR[3], stages=("critique",)), *FOUR[:3]),
}


def pairs(count: int = 60) -> list[Record]:
    made = []
    for n in range(count):
        texts = {name: {"text": f"{name} {n}", "ids": [n], "finish": "stop"} for name in "ab"}
        prompt = [{"role": "user", "content": f"q{n}"}]
        made.append({"id": f"p{n}#0", "prompt_id": f"p{n}", "prompt": prompt, "by": {"seed": 1}} | texts)
    return made


def judge(constitution: Constitution, **config: Any) -> Judge:
    return Judge(reader=Whim(), constitution=constitution, config=LabelConfig(**config), seed=3)


def labelled(judge: Judge, path: Path) -> list[Record]:
    label(judge, pairs(), path)
    return read_records(path)


@pytest.mark.parametrize("config", [{"principles": "one"}, {"principles": "some", "some": 2}, {"principles": "all"}])
@pytest.mark.parametrize("name", AMENDED)
def test_it_is_a_full_labelling_for_less(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    before, after = judge(BEFORE, **config), judge(AMENDED[name], **config)
    old, full = labelled(before, tmp_path / "old"), labelled(after, tmp_path / "full")
    fresh = replace(after, reader=Whim())
    found = relabel(before, fresh, old, tmp_path / "new")
    assert read_records(tmp_path / "new") == full
    signs = [
        [(round(p, 9) > 0.5) - (round(p, 9) < 0.5) for p in (one["p_a"], two["p_a"])]
        for one, two in zip(old, full, strict=True)
    ]
    crossed = [one["id"] for one, (was, now) in zip(old, signs, strict=True) if was != now]
    assert [one["id"] for one in flips(old, full)] == crossed
    # By hand: a question is new if its words were never asked before.
    new = set(after.reader.asked) - set(before.reader.asked)  # type: ignore[attr-defined]
    assert set(fresh.reader.asked) == new and len(fresh.reader.asked) == len(new)  # type: ignore[attr-defined]
    assert found["questions"] == len(new) / 2
    moved = sum(one["p_a"] != two["p_a"] for one, two in zip(old, full, strict=True))
    assert moved <= found["touched"] <= found["comparisons"] == 60 and found["asked"] <= found["touched"]
    if name == "source only":
        assert (found["touched"], found["asked"]) == (0, 0)
    if name == "re-weighted" and config["principles"] == "all":
        assert (found["touched"], found["asked"]) == (60, 0)


def test_thoughts_are_carried_over_and_thought_anew_where_the_question_is_another(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"principles": "all", "thoughts": 2}
    before, after = judge(BEFORE, **settings), judge(AMENDED["reworded"], **settings)
    old, full = labelled(before, tmp_path / "old"), labelled(after, tmp_path / "full")
    assert relabel(before, replace(after, reader=Whim()), old, tmp_path / "new")["questions"] == 60
    assert read_records(tmp_path / "new") == full


@pytest.mark.parametrize(
    "change", [lambda j: replace(j, seed=4), lambda j: replace(j, config=LabelConfig(principles="all"))]
)
def test_labels_of_another_judge_are_refused(change: Callable[[Judge], Judge], tmp_path: Path) -> None:
    before = judge(BEFORE)
    with pytest.raises(ValueError, match="another judge, or by other settings"):
        relabel(before, change(before), labelled(before, tmp_path / "old"), tmp_path / "new")


@pytest.mark.parametrize(
    ("p_a", "said"), [(None, "abstained"), (0.5, "tie"), (0.5 + 1e-12, "tie"), (0.51, "a"), (0.49, "b")]
)
def test_sides(p_a: float | None, said: str) -> None:
    assert side(p_a) == said
