"""Trust in a judge: readings worked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from bylaw.cli import main
from bylaw.rlaif.trust import calibration, describe_trust, trust


def reading(id: str, first: float, second: float, mass: float = 0.5, abstained: str = "") -> dict[str, Any]:
    """p(A) in both orders; as in the labels, an abstained one keeps its sides but has no p_a."""
    sides = {name: {"p_first": p, "mass": mass} for name, p in (("a_first", first), ("b_first", second))}
    named = {"principle": {"id": id, "hash": "h"}, "weight": 1.0, **sides, "abstained": abstained}
    if abstained:
        return named | {"p_a": None}
    return named | {"p_a": 0.5 + (first - second) / 2, "position_bias": (first + second) / 2 - 0.5}


def preference(p_a: float | None, *readings: dict[str, Any], texts: str = "xy", abstained: str = "") -> dict[str, Any]:
    a, b = ({"text": text} for text in texts)
    return {"p_a": p_a, "abstained": abstained, "a": a, "b": b, "labels": list(readings)}


PREFERENCES = [
    preference(0.7, reading("one", 0.9, 0.5, mass=0.9), reading("two", 0.6, 0.2, mass=0.75)),
    preference(0.5, reading("one", 0.6, 0.6, mass=0.5), texts="xx"),
    preference(0.502, reading("two", 0.71, 0.7, mass=0.5)),
    preference(None, reading("one", 0.9, 0.1, mass=0.01, abstained="low mass"), abstained="low mass"),
    preference(1.0),  # a person's
]


def test_labels_ties_and_abstentions_are_counted() -> None:
    found = trust(PREFERENCES, tie=0.01)
    assert found["pairs"] == 5
    assert found["labels"] == {"read": 4, "ties": 2, "abstained": {"low mass": 1}, "same_text": 1}
    assert found["readings"] == {"read": 4, "ties": 2, "abstained": {"low mass": 1}}
    assert found["principles"]["one"]["readings"] == {"read": 2, "ties": 1, "abstained": {"low mass": 1}}
    assert trust(PREFERENCES, tie=0.0)["labels"]["ties"] == 1


def test_option_mass_is_of_all_that_was_asked_and_bias_of_what_counts() -> None:
    found = trust(PREFERENCES)
    masses = [0.9, 0.9, 0.75, 0.75, 0.5, 0.5, 0.5, 0.5, 0.01, 0.01]
    assert found["option_mass"]["mean"] == pytest.approx(sum(masses) / 10)
    assert found["option_mass"]["quantiles"]["0.5"] == 0.5
    assert found["option_mass"]["histogram"] == [2, 0, 0, 0, 0, 4, 0, 2, 0, 2]
    biases = [0.2, -0.1, 0.1, 0.205]
    assert found["position_bias"]["mean"] == pytest.approx(sum(biases) / 4)
    assert found["position_bias"]["mean_absolute"] == pytest.approx(sum(map(abs, biases)) / 4)
    assert sum(found["position_bias"]["histogram"]) == 4
    assert found["principles"]["two"]["position_bias"]["mean"] == pytest.approx((-0.1 + 0.205) / 2)


def test_consistency_leaves_out_equal_answers_and_halves() -> None:
    """Of the readings of different answers that count, one has a half in an order, one agrees, one does not."""
    assert trust(PREFERENCES)["consistent"] == 0.5
    assert trust(PREFERENCES)["principles"]["one"]["consistent"] is None


def test_every_thought_counts_for_the_option_mass() -> None:
    thinks = reading("one", 0.9, 0.5, mass=0.6) | {
        "a_first_each": [
            {"mass": 0.9, "abstained": ""},
            {"mass": 0.0, "abstained": "low mass"},
            {"abstained": "no letter"},
        ],
        "b_first_each": [{"mass": 0.3, "abstained": ""}],
    }
    assert trust([preference(0.7, thinks)])["option_mass"]["mean"] == pytest.approx((0.9 + 0.0 + 0.3) / 3)


def test_nothing_read_has_no_means() -> None:
    found = trust([preference(1.0)])
    assert (found["option_mass"], found["position_bias"], found["consistent"]) == (None, None, None)
    assert "1 pairs: 1 labels" in describe_trust(found)
    with pytest.raises(ValueError, match=r"tie = 0\.6 .* 0 to 0\.5"):
        trust([], tie=0.6)


def test_calibration_against_known_answers() -> None:
    """Two bins: (0.1, 0.3) with one right of two, and (0.9, 0.9) with both: gaps 0.3 and 0.1."""
    found = calibration([0.1, 0.3, 0.9, 0.9], [0, 1, 1, 1], bins=2)
    assert found["ece"] == pytest.approx((2 * 0.3 + 2 * 0.1) / 4) and found["accuracy"] == 0.75
    rows = [(row["from"], row["pairs"], row["predicted"], row["label"]) for row in found["reliability"]]
    assert rows == [(0.0, 2, pytest.approx(0.2), 0.5), (0.5, 2, pytest.approx(0.9), 1.0)]
    assert calibration([0.3], [0.5])["accuracy"] is None
    with pytest.raises(ValueError, match="at least 1"):
        calibration([], [])


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "label").mkdir()
    (tmp_path / "recipe.toml").write_text("")
    whole = [
        one
        | {"id": str(n), "prompt_id": "p", "prompt": [], "by": {}}
        | {"labels": [reading | {"weight": 1.0} for reading in one["labels"]]}
        for n, one in enumerate(PREFERENCES)
    ]
    text = "".join(json.dumps(one) + "\n" for one in whole)
    (tmp_path / "label" / "preferences.jsonl").write_text(text + '{"torn')  # the stage is still at work
    main(["trust", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out) == trust(PREFERENCES)
    main(["trust", str(tmp_path)])
    table = capsys.readouterr().out
    assert "5 pairs: 4 labels, 2 of them ties" in table and "abstained, 1: low mass" in table
    assert ["two", "2", "0", "1", "0.625"] in [line.split()[:5] for line in table.splitlines()]
