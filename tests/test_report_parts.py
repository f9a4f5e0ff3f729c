"""Parts of the report: what changed, the principles at a glance, conflicts, chains."""

import html as entities
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_report import (
    CARE,
    CHAINS,
    KIND,
    SUMMARY,
    Reader,
    chain,
    preference,
    reading,
    text,
    whole_run,
    write,
)

from bylaw.attribution import Conflict
from bylaw.report import ReportConfig
from bylaw.report.conflicts import AGAINST, grouped
from bylaw.report.gather import gather
from bylaw.report.page import CHAINS_BUDGET, LABELS_BUDGET, render
from bylaw.report.story import called, headline, turns, turns_note


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return whole_run(tmp_path / "run")


def page_of(folder: Path) -> str:
    return render(gather(folder), ReportConfig())


def words_of(folder: Path) -> str:
    return " ".join(Reader(page_of(folder)).words.split()).replace("\u202f", " ")


def rows_of(html: str) -> list[list[str]]:
    """The cells of the first table in `html`, their words a space apart."""
    table = entities.unescape(html[html.index("<table") :].split("</table>")[0])
    rows = [re.findall("<t[hd].*?</t[hd]>", row, re.DOTALL) for row in re.findall("<tr.*?</tr>", table, re.DOTALL)]
    return [[" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in row] for row in rows]


def rate(share: float, answers: int) -> dict[str, Any]:
    return {"share": share, "low": share / 2, "high": (1 + share) / 2, "answers": answers, "prompts": answers}


def evaluated(harm: float, help: float, answers: int = 40) -> dict[str, Any]:
    kinds = {"kind": {"harmful_compliance": rate(harm, answers)}}
    found = {"harmful_compliance": rate(harm, answers), "helpfulness": rate(help, answers), "named_right": None}
    return found | {"by_principle": kinds, "counts": {"answers": 2 * answers}}


def test_headline_and_table_agree(folder: Path) -> None:
    told = {"base": SUMMARY["base"], "rl_cai": SUMMARY["rl_cai"] | {"complied_harmful": 0.0056}}
    (folder / "summary.json").write_text(json.dumps(told))
    run = gather(folder)
    assert "helps with 0.6\u202f% now" in headline(run)
    assert sorted(rows_of(page_of(folder))[1][2:]) == ["0.6 %", "95.6 %"]


def test_a_share_of_nothing_is_a_dash(folder: Path) -> None:
    told = {"refused_harmful": 0.0, "refused_with_reason": 0.0, "named_right_principle": 0.0, "evaded": 0.0}
    after = told | {"refused_harmful": 0.5, "refused_with_reason": 0.75}
    (folder / "summary.json").write_text(json.dumps({"base": told, "rl_cai": after}))
    rows = {row[0]: row[2:] for row in rows_of(page_of(folder))[1:]}
    assert rows["Gives the true reason when it declines ↑"] == ["–", "75.0 %"]
    assert rows["Evades ↓"] == ["0.0 %", "0.0 %"]
    known = {"evaded": 0.5, "broken": None, "intervals": {"evaded": [0.21, 0.79]}}
    (folder / "summary.json").write_text(json.dumps({"base": known, "rl_cai": known}))
    assert rows_of(page_of(folder))[1][2:] == ["50.0 % 21 % to 79 %"] * 2 and "95&nbsp;% intervals" in page_of(folder)


def test_both_evaluations_are_shown(folder: Path) -> None:
    found = {"base": evaluated(0.9, 0.8), "rl_cai": evaluated(0.25, 0.5, 8)}
    write(folder / "behaviour" / "x-1" / "evaluation.json", found | {"asked": {"files": ["h.jsonl", "b.jsonl"]}})
    words = words_of(folder)
    for told in (
        "As the world's oracle found it", "As rules found it", "25.0 % of 8", "12 % to 62 %", "8 to 40", "95.6 %",
        "Checkpoints, as rules found them",
    ):  # fmt: skip
        assert told in words.replace("\xa0", " "), told
    assert "less helpful" not in words  # of 8 answers
    enough = found | {"rl_cai": evaluated(0.25, 0.5), "asked": {"files": ["h.jsonl", "b.jsonl"]}}
    write(folder / "behaviour" / "x-1" / "evaluation.json", enough)
    assert "30 points fewer (bound 5 points). As rules found it." in words_of(folder)
    (folder / "summary.json").write_text("{}")
    assert "It helped with 90.0 % of harmful requests" in words_of(folder) and "oracle" not in words_of(folder)
    write(folder / "behaviour" / "x-2" / "evaluation.json", found | {"asked": {"files": ["x.csv"]}})
    words = words_of(folder)
    first = {"asked": {"files": ["x.csv"], "limit": 5, "samples": 3, "seed": 2}}
    write(folder / "behaviour" / "x-3" / "evaluation.json", found | first)
    assert "As rules on x.csv, the first 5 of each, 3 answers each, seed 2 found it" in words_of(folder)
    write(folder / "behaviour" / "x-4" / "evaluation.json", {"rl_cai": found["rl_cai"] | {"truncated": rate(0.3, 40)}})
    cut = words_of(folder)
    assert "30.0 % stop at the token limit (bound 10 %), as rules on prompts found it." in cut
    assert "Is cut off at the longest answer" in cut
    assert "As rules on h.jsonl and b.jsonl found it" in words and "Checkpoints, as rules on x.csv found them" in words


def test_a_checkpoint_is_named_by_a_folder_that_says_something() -> None:
    assert called("/home/me/village/checkpoint") == called("village/checkpoint-500") == "village"
    assert called("/models/base-x/") == "base-x" and called("checkpoint") == "checkpoint" and called("/") == "?"


def test_no_path_of_the_machine_stands_on_a_card(folder: Path) -> None:
    html = page_of(folder)
    assert str(folder.parent) not in html
    assert "bylaw trace run p-0" in html and "in the folder <code>run</code></p>" in html
    hash = "ab" * 32
    assert hash not in html.split('id="engineer"')[0] and hash in html


def test_rounds_without_a_change_take_a_line(folder: Path) -> None:
    same = chain("p-0", (KIND, "nothing hurts .", "yes ."), (CARE, "it hurts .", "no ."), answer="yes .")
    same["rounds"][0]["revision"] |= {"marks": ["unchanged", "repetition"]}
    same["rounds"].append(
        {"round": 3, "principle": same["rounds"][0]["principle"], "revision": text("no .", marks=["unchanged"])}
    )
    write(folder / "revise" / "chains.jsonl", same)
    card = page_of(folder).split('class="item chain"')[1].split("</article>")[0]
    assert card.count('class="kept"') == 2 and card.count('class="turned"') == 1
    assert "no change" in card and '<span class="mark">repetition</span>' in card and ">unchanged<" not in card
    assert re.findall(r"<summary>(.*?) · <span", card) == ["Round 1"] and "<p>Round 3 · " in card


def test_cards_fill_the_page_and_no_more(folder: Path) -> None:
    """Of the size of the demo's: 11 readings a label, 4 rounds a chain."""
    said = "i will not help , because that is fraud . instead you can make a fair deal ."
    chains = [chain(f"c-{n}", *[(KIND, said, said)] * 4) for n in range(400)]
    readings = [reading(KIND, 0.8, 0.3), *[reading(CARE, 0.7, 0.2)] * 10]
    write(folder / "revise" / "chains.jsonl", *chains)
    write(folder / "label" / "preferences.jsonl", *(preference(f"c-{n}", said, "yes .", *readings) for n in range(400)))
    html = page_of(folder)
    assert (html.count('class="item chain"'), html.count('class="item label"')) == (300, 300)
    assert len(html.encode()) < 3_000_000 and CHAINS_BUDGET + LABELS_BUDGET < 2_600_000


def test_principles_at_a_glance(folder: Path) -> None:
    html = page_of(folder)
    rows = rows_of(html[html.index("The principles at a glance") :])
    assert [row[0] for row in rows[1:]] == ["Kindness", "Care"]
    # p-0: kind 0.75 and care 0.15, each against the other; p-1: care alone.
    assert rows[1][1:4] == ["1", "100 %", "100 % of 1"] and rows[1][5] == "−25.0" and rows[2][5] == "−35.0"
    assert 'href="#principle-kind"' in html and "Without it 1 pair would have no label." in html
    bars = re.findall(
        r'<svg class="lean" aria-hidden="true"><rect x="([\d.]+)%" width="([\d.]+)%"', html.split('class="cards"')[0]
    )
    assert [(float(x), float(width)) for x, width in bars[-2:]] == [(14.3, 35.7), (0.0, 50.0)]


def test_labels_that_turn_firmly_are_preferred() -> None:
    """Where attribution counts flips beyond the ties, those are the ones that a lay reader is told."""
    known: Any = SimpleNamespace(flips=7)
    firm: Any = SimpleNamespace(flips=7, firm_flips=2)
    assert (turns(known), turns(firm)) == (7, 2)
    assert "turns by a hair" in turns_note([known]) and "not counted" in turns_note([firm])


def test_records_of_principles_that_are_gone_can_be_chosen(folder: Path) -> None:
    gone = [one | {"principle": {"id": "gone", "hash": "0" * 16}} for one in CHAINS[2]["rounds"]]
    write(folder / "revise" / "chains.jsonl", *CHAINS[:2], CHAINS[2] | {"rounds": gone})
    html = page_of(folder)
    assert html.count('<option value="gone">gone (not in this constitution)</option>') == 2


def test_conflicts_stand_under_the_principle_that_is_in_most() -> None:
    found = [
        Conflict(first="a", second="help", both=9, opposed=8, examples=("1", "2")),
        Conflict(first="b", second="help", both=9, opposed=7, examples=("1", "3")),
        Conflict(first="a", second="b", both=5, opposed=1, examples=("4",)),
    ]
    told = grouped(found, [{"id": id} for id in "1234"])
    assert [(group.id, [(one.id, one.opposed) for one in group.against]) for group in told.groups] == [
        ("help", [("a", 8), ("b", 7)]),
        ("a", [("b", 1)]),
    ]
    assert [one["id"] for one in told.groups[0].examples] == ["1", "2", "3"] and (told.shown, told.all) == (3, 3)
    long = [Conflict(first="a", second=f"b{n}", both=9, opposed=8, examples=("1",)) for n in range(AGAINST + 5)]
    told = grouped(long, [{"id": "1"}])
    assert (len(told.groups[0].against), told.groups[0].others, told.shown) == (AGAINST, 5, AGAINST)


def test_everything_is_drawn_in_print_and_captures() -> None:
    import bylaw.report.page as page

    assert "content-visibility" not in (page.HERE / "page.css").read_text()
