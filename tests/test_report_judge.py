"""The report's part on the judge: how its labels are shown and drawn, what is known of it, its marks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import CARE, KIND, SUMMARY, THOUGHTS, Reader, preference, reading, whole_run, write

from bylaw.attribution import attribute
from bylaw.report import ReportConfig
from bylaw.report.figures import Axis, Point, bars, scatter
from bylaw.report.gather import gather
from bylaw.report.judged import judge
from bylaw.report.page import render
from bylaw.report.shown import deciders, side, verdict
from bylaw.rlaif.trust import trust

TURN = "\u202egnp"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return whole_run(tmp_path / "run")


def words_of(folder: Path) -> str:
    return " ".join(Reader(render(gather(folder), ReportConfig())).words.split()).replace("\u202f", " ")


def panels(folder: Path) -> dict[str, Any]:
    return {panel.title: panel for panel in judge(gather(folder))}


def test_what_is_decided_is_what_attribution_says() -> None:
    """At the threshold itself floating point makes 0.45 nearer to a half than 0.55."""
    assert [side(p) for p in (0.55, 0.45, 0.5499, 0.4501, 0.5)] == ["a", "b", "", "", ""]
    for first, second in ((0.55, 0.45), (0.45, 0.55), (0.9, 0.81)):
        one = preference("p", "yes .", "no .", reading(KIND, first, second), reading(CARE, 0.5, 0.5))
        effect = next(row for row in attribute([], [one], gather_constitution()).principles if row.id == "kind")
        assert (effect.decided == 1.0) == ("kind" in [id for id, _, _ in deciders(one)])
    same = preference("p", "yes .", "yes .", reading(KIND, 0.9, 0.1))
    assert verdict(same) == "same" and verdict(preference("p", "a", "b", abstained="no letter")) == "abstained"


def gather_constitution() -> Any:
    from test_report import OURS

    return OURS


def test_labels_of_one_half_lie_in_the_middle(folder: Path) -> None:
    """Exact halves once fell into the bar right of the middle, and looked like a lean to A."""
    half, sure = reading(KIND, 0.5, 0.5), reading(KIND, 0.9, 0.1)
    made = [preference(f"p-{n}", "yes .", "no .", half) for n in range(5)]
    made += [preference(f"s-{n}", "yes .", "yes .", half) for n in range(3)] + [preference("q", "yes .", "no .", sure)]
    write(folder / "label" / "preferences.jsonl", *made)
    labels = panels(folder)["Labels"]
    middle = [row for row in labels.rows if row[0] < 0.5 < row[1]]
    assert len(labels.rows) % 2 == 1 and [row[2] for row in middle] == [5]
    assert sum(row[2] for row in labels.rows) == 6 and "Left out: 3 pairs of twice the same text" in labels.note
    assert "Of 6 labels 1 prefer A, 0 prefer B, and 5 lie near one half" in labels.note


def test_axes_go_where_the_readings_are(folder: Path) -> None:
    made = [preference(f"p-{n}", "yes .", "no .", reading(KIND, 0.6, 0.44, mass=0.997)) for n in range(4)]
    write(folder / "label" / "preferences.jsonl", *made)
    bias, mass = panels(folder)["Position bias"], panels(folder)["Option mass"]
    assert bias.rows[0][0] == -bias.rows[-1][1] == -0.02 and len(bias.rows) % 2 == 1
    assert (mass.rows[0][0], mass.rows[-1][1]) == (0.995, 1.0)
    measured = trust(made)
    counts = measured["position_bias"]["histogram"], measured["option_mass"]["histogram"]
    assert (sum(row[2] for row in bias.rows), sum(row[2] for row in mass.rows)) == tuple(map(sum, counts)) == (4, 8)


def test_thoughts_are_asked_each_by_itself(folder: Path) -> None:
    each = {
        f"{order}_each": [{"mass": 0.9, "p_first": 0.5}, {"abstained": "too long"}] for order in ("a_first", "b_first")
    }
    one = preference("p", "yes .", "no .", reading(KIND, 0.9, 0.1) | each | {"thoughts": THOUGHTS})
    write(folder / "label" / "preferences.jsonl", one)
    assert sum(row[2] for row in panels(folder)["Option mass"].rows) == 2


def test_the_table_by_principle_is_that_of_trust(folder: Path) -> None:
    kind, care, turned = reading(KIND, 0.8, 0.3), reading(CARE, 0.2, 0.9), reading(CARE, 0.6, 0.5 + 1e-9)
    made = preference("p", "yes .", "no .", kind, care), preference("q", "yes .", "no .", turned)
    write(folder / "label" / "preferences.jsonl", *made)
    html = render(gather(folder), ReportConfig())
    table = html[html.index("<h3>By principle</h3>") :]
    rows = [re.sub("<[^>]*>", " ", row).split() for row in re.findall("<tr.*?</tr>", table.split("</table>")[0])]
    assert [" ".join(row) for row in rows[1:]] == [
        "All 3 0 0 % of 3 99.0 % +5.0 67 %",
        "Kindness 1 0 0 % of 1 99.0 % +5.0 100 %",
        "Care 2 0 0 % of 2 99.0 % +5.0 50 %",
    ]
    for told in ("Could not be read", "Answers with a letter", "Same answer in both orders"):
        assert told in table


def test_judgements_are_not_called_labels(folder: Path) -> None:
    whole = {"whole_label_accuracy": 0.7, "whole_label_ece": 0.2, "whole_labels_decided": 12.0}
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"label_accuracy": 0.96, "labels_decided": 480.0}))
    told = "Of 480 judgements by one principle each, whose right answer is known, 96.0 % are right"
    assert told in words_of(folder) and "whole label" not in words_of(folder)
    (folder / "summary.json").write_text(json.dumps(SUMMARY | whole))
    assert "Of 12 whole labels, in which all principles have a part, 70.0 % of 12 are right" in words_of(folder)


def test_labels_that_decide_stand_first(folder: Path) -> None:
    half = reading(KIND, 0.5, 0.5)
    made = [
        preference("none", "a", "b", abstained="no letter"),
        preference("same", "yes .", "yes .", half),
        preference("tie", "yes .", "no .", half),
        preference("b", "yes .", "no .", reading(KIND, 0.1, 0.8), reading(CARE, 0.5, 0.49)),
        preference("a", "yes .", "no .", reading(KIND, 0.9, 0.1)),
    ]
    write(folder / "label" / "preferences.jsonl", *made)
    html = render(gather(folder), ReportConfig())
    assert re.findall(r'class="item label".*?<code class="key">(\w+)#0', html, re.DOTALL) == [
        "b",
        "a",
        "tie",
        "same",
        "none",
    ]
    told = re.findall(r'class="verdict"><p><b>(.*?)</b>', html)
    assert told == ["B is better", "A is better", "undecided", "the same text twice", "abstained"]
    card = html[html.index('class="item label"') :].split("</article>")[0]
    assert 'data-principles="kind"' in card and "Decided for B:" in card
    at = re.search(r'<circle class="sure" cx="([\d.]+)%"', card)
    assert at and float(at[1]) == pytest.approx(100 * (1 - made[3]["p_a"]), abs=0.05)


def test_marks_of_a_judge_that_gives_the_rewards(folder: Path) -> None:
    def episode(*readings: tuple[str, float | None]) -> dict[str, Any]:
        made = [
            {"principle": {"id": id, "hash": "h"}, "mean": mean, "abstained": "" if mean else "too little probability"}
            for id, mean in readings
        ]
        return {"prompt_id": "p", "rating": {"score": 0.1, "readings": made}}

    for stage in ("compare", "label", "reward"):
        for path in (folder / stage).iterdir():
            path.unlink()
    (folder / "recipe.toml").write_text('base = "b"\nconstitution = "default"\n[ppo]\nreward = "judge"\n')
    write(
        folder / "ppo" / "rollouts.jsonl", episode(("care", 4.0), ("kind", 9.0)), episode(("care", 7.0), ("kind", None))
    )
    html = render(gather(folder), ReportConfig())
    assert "No labels" not in html and 'id="labels"' not in html
    table = html[html.index('id="marks"') :].split("</table>")[0]
    rows = [re.sub("<[^>]*>", " ", row).split() for row in re.findall("<tr.*?</tr>", table)]
    assert rows[1:] == [["Kindness", "1", "9.0", "1"], ["Care", "2", "5.5", "0"]]
    assert "it gave 2 marks of 5.5 on average" in html
    (folder / "ppo" / "rollouts.jsonl").unlink()
    assert "No marks yet" in render(gather(folder), ReportConfig())


def test_a_hidden_character_does_not_reach_a_figure() -> None:
    x = Axis(TURN, 0.0, 1.0)
    for svg in (scatter(TURN, [Point(0.5, 0.5, TURN)], x, x), bars(TURN, [0.0, 1.0], [1], x, TURN)):
        assert "\u202e" not in svg and "⟨U+202E⟩gnp" in svg
