"""Attribution on records small enough to work by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from bylaw.attribution import Attribution, PrincipleEffect, attribute, attribute_run, describe_attribution
from bylaw.cli import main
from bylaw.constitution.load import parse_constitution
from bylaw.constitution.schema import Constitution, Principle

NAMES = ("kind", "brief", "rare")


def constitution() -> Constitution:
    principles = tuple(
        Principle(id=id, title=id.title(), statement=f"Be {id}.", sources=("a test",), weight=weight)
        for id, weight in zip(NAMES, (1.0, 2.0, 1.0), strict=True)
    )
    return Constitution(name="t", version="1", license="CC0-1.0", preamble="", principles=principles)


def chain(answer: str, *steps: tuple[str, str]) -> dict[str, Any]:
    rounds = [
        {"round": n, "principle": {"id": id, "hash": "h"}, "critique": {"text": "c"}, "revision": {"text": text}}
        for n, (id, text) in enumerate(steps, 1)
    ]
    return {"id": answer, "answer": {"text": answer}, "rounds": rounds, "by": {"constitution": "h"}}


def preference(id: str, **readings: tuple[float, float | None]) -> dict[str, Any]:
    labels = [
        {
            "principle": {"id": name, "hash": "h"},
            "weight": weight,
            "p_a": p,
            "abstained": "" if p is not None else "mute",
        }
        for name, (weight, p) in readings.items()
    ]
    return {"id": id, "labels": labels, "abstained": "", "by": {"constitution": "h"}}


CHAINS = [
    chain("x", ("kind", "y"), ("brief", "y"), ("kind", "x")),  # changed, kept, changed back
    chain("z", ("kind", "z"), ("old-rule", "w")),
]
# Centred and weighted: kind 1, brief 2, rare 1.
PREFERENCES = [
    preference("one", kind=(1, 0.9), brief=(2, 0.2)),  # total 0.4 - 0.6 = -0.2 of 3: b
    preference("two", kind=(1, 0.6), brief=(2, 0.7), rare=(1, None)),  # 0.1 + 0.4 = 0.5 of 3: a
    preference("three", kind=(1, 0.1), brief=(2, 0.65)),  # -0.4 + 0.3 = -0.1 of 3: b
    preference("four", rare=(1, 0.5), kind=(1, None)),  # the only one that speaks, and for neither
    {"id": "of people", "p_a": 1.0, "labels": []},
]


def found() -> Attribution:
    return attribute(CHAINS, PREFERENCES, constitution(), decided=0.1)


def effect(id: str) -> PrincipleEffect:
    return next(one for one in found().principles if one.id == id)


def test_draws_and_changes_are_counted_against_the_text_before() -> None:
    rows = {one.id: (one.rounds, one.changed, one.title) for one in found().principles}
    assert rows == {"kind": (3, 2, "Kind"), "brief": (1, 0, "Brief"), "rare": (0, 0, "Rare"), "old-rule": (1, 1, "")}
    assert (found().chains, found().pairs, found().without_readings) == (2, 4, 1)


def test_labels_against_numbers_worked_by_hand() -> None:
    kind, brief, rare = map(effect, NAMES)
    assert (kind.labels, kind.abstained, brief.labels, brief.abstained) == (3, {"mute": 1}, 3, {})
    assert kind.strength == pytest.approx((0.4 + 0.1 + 0.4) / 3)
    assert brief.strength == pytest.approx((0.3 + 0.2 + 0.15) / 3)
    assert (kind.decided, brief.decided, rare.decided) == (1, 1, 0)  # 0.6 is 0.1 from a half, rounding or not
    # Towards the other's answer: of kind -0.4 (brief wants b), +0.1, -0.4.
    assert kind.direction == pytest.approx((-0.4 + 0.1 - 0.4) / 3)
    assert brief.direction == pytest.approx((-0.3 + 0.2 - 0.15) / 3)
    assert kind.disagrees == brief.disagrees == pytest.approx(2 / 3)
    assert (rare.direction, rare.disagrees) == (None, None)


def test_leaving_one_out_against_numbers_worked_by_hand() -> None:
    kind, brief, rare = map(effect, NAMES)
    # Without kind: -0.3, 0.2, 0.15 of brief, instead of -0.2/3, 0.5/3, -0.1/3. Without brief: 0.4, 0.1, -0.4.
    assert (kind.flips, brief.flips) == (1, 1)
    assert kind.change == pytest.approx((abs(-0.3 + 0.2 / 3) + abs(0.2 - 0.5 / 3) + abs(0.15 + 0.1 / 3)) / 3)
    assert brief.change == pytest.approx((abs(0.4 + 0.2 / 3) + abs(0.1 - 0.5 / 3) + abs(-0.4 + 0.1 / 3)) / 3)
    assert (kind.lost, rare.lost, rare.flips, rare.change) == (0, 1, 0, None)


def test_a_flip_between_ties_is_no_firm_one() -> None:
    """Without kind 0.499 and 0.4, instead of 0.501 and 0.55."""
    pairs = [preference("hair", kind=(1, 0.503), brief=(1, 0.499)), preference("firm", kind=(1, 0.7), brief=(1, 0.4))]
    kind = attribute([], pairs, constitution()).principles[0]
    assert (kind.flips, kind.firm_flips) == (2, 1)


def test_conflicts_name_the_pairs_that_are_furthest_apart_first() -> None:
    (conflict,) = found().conflicts
    assert (conflict.first, conflict.second, conflict.both, conflict.opposed) == ("kind", "brief", 3, 2)
    assert conflict.examples == ("one", "three")  # 0.7 and 0.55 apart
    assert not attribute([], PREFERENCES, constitution(), decided=0.45).conflicts


def test_weights_decide_the_rest() -> None:
    """Against 0.9 of weight 1, 0.4 of weight 5 is the heavier side: 0.4 - 0.5 = -0.1 of 6."""
    pair = preference("p", kind=(1, 0.9), brief=(5, 0.4), rare=(1, 0.7))
    rare = next(one for one in attribute([], [pair], constitution()).principles if one.id == "rare")
    assert rare.direction == pytest.approx(-0.2) and rare.disagrees == 1


@pytest.mark.parametrize("decided", [0.0, 0.6])
def test_a_threshold_that_means_nothing_is_refused(decided: float) -> None:
    with pytest.raises(ValueError, match=r"decided = .* at most 0\.5"):
        attribute([], [], constitution(), decided)


def test_empty_records_have_no_means() -> None:
    empty = attribute([], [], constitution())
    assert [one.strength for one in empty.principles] == [None] * 3 and "none decided" in describe_attribution(empty)


KEPT = """
name = "kept"
version = "1"
license = "CC0-1.0"
preamble = "p"
[[principle]]
id = "kind"
title = "Kept title"
statement = "Be kind."
sources = ["a test"]
"""


def test_a_run_folder_is_read_with_the_constitution_that_it_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(FileNotFoundError, match="nothing in revise"):
        attribute_run(tmp_path)
    hash = parse_constitution(KEPT, "kept").hash
    sides = {"prompt_id": "p", "prompt": [], "a": {}, "b": {}, "p_a": 0.5, "abstained": ""}
    chains, preferences = (
        [sides | one | {"by": {"constitution": hash}} for one in some] for some in (CHAINS, PREFERENCES)
    )
    for name, text in ((f"constitutions/{hash}.toml", KEPT), ("revise/chains.jsonl", lines(chains) + '{"id": "torn')):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    assert attribute_run(tmp_path).principles[0].title == "Kept title"  # the last line and the labels are still to come
    (tmp_path / "label").mkdir()
    (tmp_path / "label" / "preferences.jsonl").write_text(lines(preferences))
    main(["attribution", str(tmp_path), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["principles"][0]["flips"] == 1 and printed["conflicts"][0]["opposed"] == 2
    main(["attribution", str(tmp_path)])
    table = capsys.readouterr().out
    assert "kind and brief: opposed on 2 of 3 pairs, such as one, three" in table
    assert ["kind", "3", "66.7%", "3", "1", "0.300"] in [line.split()[:6] for line in table.splitlines()]


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
