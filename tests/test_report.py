"""The report of a run folder written by hand: what stands on the page, and what cannot break out of it."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from small_run import CONSTITUTION

from bylaw.cli import main
from bylaw.constitution.load import parse_constitution
from bylaw.constitution.write import dump_constitution
from bylaw.report import ReportConfig, write_report
from bylaw.report.figures import Axis, Series, line_chart
from bylaw.report.gather import gather
from bylaw.report.page import CHAINS_BUDGET, LABELS_BUDGET, render
from bylaw.report.panels import POINTS, thinned
from bylaw.report.sample import sample
from bylaw.sums import SUMS, read_sums, write_sums
from bylaw.words import number, percent, points, share, signed, visible, word_diff

HOSTILE = (
    '<script>alert(1)</script> </script> {{7*7}} {% raw %} <img src=x onerror=alert(2)> \x00 \u202egnp.exe " onclick=" '
    "[a](javascript:alert(3)) <!-- ]]> &lt; \x1b[31m \u2028"
)
OURS = parse_constitution(CONSTITUTION, "small")
KIND, CARE = OURS.principles
BY = {"seed": 3, "constitution": OURS.hash, "model": "m"}


def text(words: str, finish: str = "stop", **more: Any) -> dict[str, Any]:
    return {"text": words, "ids": [1], "finish": finish} | more


def chain(id: str, *rounds: tuple[Any, str, str], answer: str = "first fetch the rope .") -> dict[str, Any]:
    made = [
        {"round": n, "principle": {"id": p.id, "hash": p.hash}, "critique": text(critique), "revision": text(revision)}
        for n, (p, critique, revision) in enumerate(rounds, 1)
    ]
    asked = [{"role": "user", "content": f"ask {id}"}]
    return {"id": id, "prompt": asked, "answer": text(answer), "rounds": made, "by": BY}


def reading(principle: Any, first: float, second: float, mass: float = 0.99) -> dict[str, Any]:
    """`first` and `second`: probability of the letter A when a, and when b, is shown first."""
    sides = [{"logprob_A": 0.0, "logprob_B": 0.0, "mass": mass, "p_first": p} for p in (first, second)]
    return {
        "principle": {"id": principle.id, "hash": principle.hash}, "weight": principle.weight, "a_first": sides[0],
        "b_first": sides[1], "p_a": 0.5 + (first - second) / 2, "position_bias": (first + second) / 2 - 0.5,
        "abstained": "",
    }  # fmt: skip


def preference(id: str, a: str, b: str, *readings: dict[str, Any], abstained: str = "") -> dict[str, Any]:
    p_a = None if abstained else sum(one["p_a"] for one in readings) / len(readings)
    asked = [{"role": "user", "content": f"ask {id}"}]
    return {
        "id": f"{id}#0", "prompt_id": id, "prompt": asked, "a": text(a), "b": text(b), "p_a": p_a,
        "abstained": abstained, "labels": list(readings), "by": BY,
    }  # fmt: skip


def write(path: Path, *records: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records))


def finish(folder: Path, name: str, counts: Mapping[str, Any]) -> None:
    manifest = {"stage": name, "inputs": {"base": "ab" * 32}, "config": {"epochs": 1}, "seed": 3, "counts": counts}
    manifest |= {"outputs": {}, "seconds": 90.0, "resumed": False, "finished": "2026-01-02T03:04:05Z", "device": "cpu"}
    write(folder / name / "manifest.json", manifest | {"versions": {"torch": "2"}})


CHAINS = [
    chain("p-0", (KIND, "the answer hurts .", "ask them first ."), (CARE, "kind .", "ask them first .")),
    chain("p-1", (CARE, HOSTILE, HOSTILE), answer=HOSTILE),
    chain("p-2", (CARE, "it hurts .", "i will not help .")),
]
CHAINS[2]["rounds"][0]["revision"] |= {"marks": ["prefix"], "raw": text("Sure : i will not help .")}
THOUGHTS = {"a_first": [text("let me think of it .")], "b_first": [text("once more .", "length")]}
PREFERENCES = [
    preference(
        "p-0",
        "yes .",
        "no .",
        reading(KIND, 0.8, 0.3) | {"thoughts": THOUGHTS},
        reading(CARE, 0.2, 0.9),
    )
    | {"unclamped": 0.91},
    preference("p-1", HOSTILE, "no .", reading(CARE, 0.9, 0.2)),
]
SUMMARY = {
    "base": {"complied_harmful": 0.956, "helpful_benign": 0.928, "answers": 765.0},
    "sl_cai": {"complied_harmful": 0.344, "helpful_benign": 0.968, "answers": 765.0},
    "rl_cai": {"complied_harmful": 0.0167, "helpful_benign": 0.973, "answers": 765.0},
    "revision_curve": [0.0, 0.45, 0.75],
    "label_accuracy": 0.89,
    "labels_decided": 250.0,
    "flips_on_amendment": 0.125,
    "amendment": {"crossed_out": "theft", "comparisons": 8},
}


def whole_run(folder: Path) -> Path:
    (folder / "constitutions").mkdir(parents=True)
    (folder / "constitutions" / f"{OURS.hash}.toml").write_text(dump_constitution(OURS))
    (folder / "recipe.toml").write_text('base = "/models/base-x"\nconstitution = "default"\nseed = 3\nlast = "ppo"\n')
    write(folder / "revise" / "chains.jsonl", *CHAINS)
    finish(folder, "revise", {"chains": 3, "rounds": 2, "helpful": 5})
    write(folder / "finetune" / "metrics.jsonl", *({"step": n, "loss": 1 / (n + 1)} for n in range(4)))
    finish(folder, "finetune", {"revisions": 4, "helpful": 5, "steps": 4})
    finish(folder, "compare", {"pairs": 2})
    write(folder / "label" / "preferences.jsonl", *PREFERENCES)
    finish(folder, "label", {"labels": 2})
    bins = [{"from": 0.7, "pairs": 3, "predicted": 0.75, "label": 0.8}]
    held = {"heldout_accuracy": 0.9, "heldout_ece": 0.05, "heldout_reliability": bins, "train_pairs": 9}
    write(folder / "reward" / "metrics.jsonl", *({"step": n, "loss": 0.7, "accuracy": 0.6} for n in range(3)))
    finish(folder, "reward", held)
    steps = [{"step": n, "objective/kl": n * 1.0, "objective/scores": 0.5 * n, "val/ended": 1.0} for n in range(4)]
    write(folder / "ppo" / "metrics.jsonl", *steps)
    finish(folder, "ppo", {"episodes": 40, "iterations": 4})
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("report") / "my run")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return render(gather(run), ReportConfig())


class Reader(HTMLParser):
    """Every tag with its attributes, every script's text, and the words that a person reads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words = ""
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words += data


def test_a_reader_finds_everything(page: str) -> None:
    words = " ".join(Reader(page).words.split())
    for told in (
        "my run", "“small”, a constitution of 2 principles", "“base-x”", "seed 3", "helped with 95.6 % of harmful",
        "helps with 1.7 % now", "The answer is kind .", "it never hurts", "Shown are all 3 chains",
        "the answer hurts .", "answered 3 requests", "bylaw trace 'my run'", "p-0#0", "Kindness against",
        "calibration error 0.05", "From 1 to 0.25. Lower", "Before (base)", "After revisions (SL-CAI)",
        "Final (RL-CAI)", "Before: the model as it came",
        "1 min 30 s", "let me think of it .", "(91.0 % for A before the clamp)", "prefix", "Sure : i will not help .",
        "2026-01-02T03:04:05Z",
        "Of 250 judgements by one principle each, whose right answer is known, 89.0 % are right",
        "“theft” were taken out as a trial, 12.5 % of 8 labels changed sides",
    ):  # fmt: skip
        assert told in words.replace("\u202f", " "), told
    for title in ("Checkpoints", "Harmlessness by revisions", "Fine-tuning loss", "Reward against KL", "Position bias"):
        assert f"<h3>{title}</h3>" in page
    assert "<ins>ask them </ins>first <del>fetch the rope </del>." in page
    # Of principle "kind": drawn once, and it changed the answer.
    card = page[page.index('id="principle-kind"') : page.index('id="principle-care"')]
    assert "Drawn for 1 critique, of which 100\u202f% changed the answer." in card


def test_what_a_model_wrote_stays_text(page: str) -> None:
    read = Reader(page)
    assert len(read.scripts) == 1 and "alert" not in read.scripts[0]
    assert not [tag for tag, _ in read.tags if tag in ("img", "iframe", "object", "link", "base")]
    for tag, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")], tag
        assert attributes.get("href", "#").startswith("#"), attributes  # type: ignore[union-attr]
    assert read.words.count("<script>alert(1)</script>") == 3 and "{{7*7}}" in read.words and "{% raw %}" in read.words
    assert "⟨U+0000⟩ ⟨U+202E⟩gnp.exe" in read.words and "⟨U+001B⟩[31m ⟨U+2028⟩" in read.words
    assert not {"\x00", "\u202e", "\x1b", "\u2028"} & set(page)
    said = [attributes for tag, attributes in read.tags if attributes.get("class") == "said"]
    assert said and all(attributes["dir"] == "auto" for attributes in said)


def test_the_policy_allows_only_what_is_ours(page: str) -> None:
    policy = next(a["content"] for _, a in Reader(page).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; ")
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        inside = page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        assert f"{name} {source(inside)};" in policy
        assert "http" not in inside and "url(" not in inside and "@import" not in inside


def source(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def test_surrogates_are_shown_and_emoji_are_not_broken() -> None:
    assert visible("a\ud800b\x85\u2066") == "a⟨U+D800⟩b⟨U+0085⟩⟨U+2066⟩"
    for fine in ("👩\u200d🚀 naïve\n\tline", "العربية", "数\u00a0字", 7, None):
        assert visible(fine) == fine


def test_word_diff_by_hand() -> None:
    assert word_diff("fetch the club, now", "fetch the big boot, now") == [
        ("same", "fetch the "), ("gone", "club"), ("new", "big boot"), ("same", ", now")
    ]  # fmt: skip
    # A comma that both have is no island between two changes.
    assert word_diff("a b, c d", "e f, g h") == [("gone", "a b, c d"), ("new", "e f, g h")]
    assert word_diff("same", "same") == [("same", "same")] and word_diff("", "x") == [("new", "x")]


def test_numbers_as_people_read_them() -> None:
    shown = [number(value) for value in (1917, -0.01285, 0.75, 12345.6, None, 0.0)]
    assert shown == ["1,917", "−0.0129", "0.75", "12,346", "–", "0"]
    shares = [percent(value).replace("\u202f", " ") for value in (0.5, 0.001, 0.0, 0.997, 1.0, None)]
    assert shares == ["50 %", "under 1 %", "0 %", "over 99 %", "100 %", "–"]
    few = [share(value, of, 1).replace("\u202f", " ") for value, of in ((0.5, 8), (0.5, 20), (0.0, 0), (0.5, None))]
    assert few == ["50.0 % of\u00a08", "50.0 %", "–", "50.0 %"]
    assert [points(value) for value in (0.121, -0.05, 0.0004)] == ["12.1 points", "5 points", "under 0.1 points"]
    assert [signed(value) for value in (0.0113, -0.006, -0.0001, None)] == ["+1.1", "−0.6", "0.0", "–"]


def test_a_sample_has_every_principle_and_keeps_its_budget() -> None:
    records = [{"id": f"r{n}", "names": ["rare" if n == 70 else "often"]} for n in range(100)]

    def draw(most: int, budget: int, seed: int) -> list[str]:
        drawn = sample(records, lambda r: r["names"], lambda r: "0123456789", most, budget, seed)
        assert {card for _, card in drawn} == {"0123456789"}
        return [r["id"] for r, _ in drawn]

    assert len(draw(8, 1000, 0)) == 8 and "r70" in draw(8, 1000, 0)
    assert draw(8, 1000, 0) == draw(8, 1000, 0) != draw(8, 1000, 1)
    assert len(draw(100, 55, 0)) == 5 and draw(100, 1000, 0) == [r["id"] for r in records]


def test_a_large_run_is_sampled_and_says_so(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    shutil.copytree(run, folder)
    long = "<" * 1500
    write(folder / "revise" / "chains.jsonl", *(chain(f"c-{n}", (KIND, long, long), answer=long) for n in range(300)))
    many = (preference(f"c-{n}", long, long + "x", reading(KIND, 0.9, 0.1)) for n in range(300))
    write(folder / "label" / "preferences.jsonl", *many)
    html = render(gather(folder), ReportConfig(seed=5))
    assert len(html.encode()) < 3_000_000
    shown = re.search(r"Shown are <b>(\d+) of 300 chains</b>, drawn with seed 5", html)
    assert shown and int(shown[1]) == html.count('class="item chain"') < 200
    for kind, budget in (("chain", CHAINS_BUDGET), ("label", LABELS_BUDGET)):
        held = sum(map(len, re.findall(f'<article class="item {kind}".*?</article>', html, re.DOTALL)))
        assert 0.8 * budget < held <= budget  # the room is used
    few = render(gather(run), ReportConfig(chains=1, labels=0))
    assert few.count('class="item chain"') == 1 and "Shown are <b>1 of 3 chains</b>" in few


def test_stages_that_are_missing_are_told(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('base = "b"\nconstitution = "village"\nlast = "dpo"\n')
    empty = Reader(render(gather(tmp_path), ReportConfig())).words
    assert "No chains: The stage “revise” has not run." in empty and "nobody has asked this run's models yet" in empty
    assert "This recipe ends in DPO" in empty and "The stage “dpo” has not run." in empty
    (tmp_path / "recipe.toml").write_text('base = "b"\nconstitution = "village"\n[ppo]\nreward = "judge"\n')
    judged = Reader(render(gather(tmp_path), ReportConfig())).words
    assert "the judge itself scores" in judged and "“ppo” has not run" in judged and "“reward” has" not in judged
    assert "“label”" not in judged and "No labels" not in judged and "is to learn to follow" in judged
    write(tmp_path / "revise" / "begun.json", {})
    write(tmp_path / "revise" / "chains.jsonl", CHAINS[0])
    with (tmp_path / "revise" / "chains.jsonl").open("a") as file:
        file.write('{"id": "torn')
    begun = Reader(render(gather(tmp_path), ReportConfig())).words
    assert "Shown are all 1 chain." in begun and "The stage “revise” has not finished" in begun
    assert "The constitution has changed since" in begun  # its records name principles that the village has not


def test_a_line_stands_where_its_numbers_are() -> None:
    svg = line_chart("t", [Series("s", [0, 5, 10], [0, 1, 0.5])], Axis("x", 0, 10), Axis("y", 0, 1, True))
    # 400 x 250 with margins 46, 12, 28, 40: x from 46 to 388, y from 210 (low) to 28 (high).
    assert 'points="46.0,210.0 217.0,28.0 388.0,119.0"' in svg
    assert Axis("x", 0, 1, True).ticks == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert "<svg" in line_chart("<b>", [], Axis("<i>", -1e-9, 1e-9), Axis("&", 0, 1e12)) and "<b>" not in svg


def test_long_curves_are_means_and_say_so() -> None:
    points, told = thinned([(float(n), float(n % 2)) for n in range(2 * POINTS)])
    assert len(points) == POINTS and points[0] == (0.5, 0.5) and "mean of 2 steps" in told
    assert thinned([(0.0, 1.0)]) == ([(0.0, 1.0)], "")


def test_the_command_writes_the_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    write_sums(folder)
    main(["report", str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    written = (folder / "report.html").read_bytes()
    assert read_sums(folder)["report.html"] == hashlib.sha256(written).hexdigest()
    main(["report", str(folder), "--out", str(tmp_path / "elsewhere.html")])
    assert (tmp_path / "elsewhere.html").read_bytes() == written
    (folder / SUMS).unlink()
    write_report(folder, ReportConfig())
    assert not (folder / SUMS).exists()
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path)])
    assert end.value.code == 2 and "is no run folder" in capsys.readouterr().err
