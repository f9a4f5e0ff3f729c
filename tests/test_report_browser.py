"""The report in headless Chromium: filters, search, and a narrow window. Skipped without a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_report import PREFERENCES, source, whole_run, write

from bylaw.report import ReportConfig
from bylaw.report.gather import gather
from bylaw.report.page import render

HARNESS = """
const seen = {errors: [], blocked: []};
window.onerror = (message) => { seen.errors.push(String(message)); };
window.alert = (message) => { seen.errors.push("alert " + message); };
document.addEventListener("securitypolicyviolation", (event) => seen.blocked.push(event.violatedDirective));
window.addEventListener("load", () => {
  const tools = (list) => document.querySelector(`[data-tools=${list}]`);
  const count = (list) => document.querySelectorAll(`[data-list=${list}] > :not([hidden])`).length;
  const set = (list, name, value) => {
    tools(list).elements[name].value = value;
    tools(list).elements[name].dispatchEvent(new Event(name === "text" ? "input" : "change"));
    return [count(list), tools(list).querySelector("output").textContent];
  };
  ASK
  setTimeout(() => { document.body.textContent = "RESULT" + JSON.stringify(seen) + "END"; }, 50);
});
"""


def ask(page: str, folder: Path, script: str, width: int = 1280) -> dict[str, Any]:
    """What `script` puts into `seen` once the page has loaded."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    harness = HARNESS.replace("ASK", script)
    allowed = page.replace("script-src ", f"script-src {source(harness)} ", 1)
    copy = folder / "page.html"
    copy.write_text(allowed.replace("<title>", f"<script>{harness}</script><title>", 1), encoding="utf-8")
    quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
    flags = ["--headless", *quiet.split(), "--disable-component-update", f"--user-data-dir={folder / 'profile'}"]
    command = [browser, *flags, f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search("<body>RESULT(.*)END</body>", done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1])
    assert seen["errors"] == []
    return seen


def page_of(run: Path, chains: int = 300) -> str:
    return render(gather(run), ReportConfig(chains=chains))


def test_filters_change_what_is_visible(tmp_path: Path) -> None:
    seen = ask(
        page_of(whole_run(tmp_path / "run")),
        tmp_path,
        """
  seen.tools = !tools("chains").hidden;
  seen.before = [count("chains"), count("labels")];
  document.querySelector(".card [data-filter=kind]").click();
  seen.kind = [count("chains"), count("labels"), tools("chains").querySelector("output").textContent];
  seen.marked = document.querySelectorAll("li.chosen").length;
  set("chains", "principle", "");
  const late = document.createElement("script");
  late.textContent = "seen.errors.push('a planted script ran')";
  document.body.append(late);
""",
    )
    assert seen["tools"] and seen["before"] == [3, 2] and seen["marked"] == 1
    assert seen["kind"] == [1, 1, "1 of 1 that fit, of 3 on this page"]
    assert seen["blocked"] == ["script-src-elem"]  # the one that was planted, and nothing of the page's own


def test_labels_are_filtered_by_who_decided(tmp_path: Path) -> None:
    """Both principles judged every pair; "care" decided on one of them alone."""
    run, (first, second) = whole_run(tmp_path / "run"), PREFERENCES
    tied = second | {"labels": [first["labels"][0] | {"p_a": 0.52}, *second["labels"]]}
    faint = first | {"labels": [first["labels"][0], first["labels"][1] | {"p_a": 0.48}]}
    write(run / "label" / "preferences.jsonl", faint, tied)
    script = """
  seen.kind = set("labels", "principle", "kind")[0];
  seen.care = set("labels", "principle", "care")[0];
"""
    assert ask(page_of(run), tmp_path, script) | {"errors": 0} == {"kind": 1, "care": 1, "errors": 0, "blocked": []}


def test_search_looks_at_what_people_read(tmp_path: Path) -> None:
    script = """
  seen.found = ["WILL not", "ask p-0", "p-2", "kindness", "hurts"].map((words) => set("chains", "text", words)[0]);
  seen.none = ["critique", "trace", "revision"].map((words) => set("chains", "text", words)[1]);
  seen.titles = ["kindness", "judgement", "first", "p-1#0"].map((words) => set("labels", "text", words)[0]);
"""
    run = whole_run(tmp_path / "run")
    seen = ask(page_of(run), tmp_path, script)
    assert seen["found"] == [1, 1, 1, 1, 2] and seen["titles"] == [1, 0, 0, 1]
    assert set(seen["none"]) == {"None of the 3 on this page fits."}
    sampled = ask(page_of(run, chains=2), tmp_path, 'seen.none = set("chains", "text", "no such word")[1];')
    told = "None of the 2 on this page fits; 1 more in revise/chains.jsonl."
    assert sampled["none"] == told


def test_a_narrow_window_holds_everything(tmp_path: Path) -> None:
    """A title longer than the window; tables wider than it say so by their shade."""
    run = whole_run(tmp_path / "run")
    kept = next((run / "constitutions").iterdir())
    kept.write_text(kept.read_text().replace('"Kindness"', f'"{"Kindness to all people " * 9}"'))
    script = """
  const box = (name) => tools("chains").elements[name].getBoundingClientRect();
  const wide = [...document.querySelectorAll(".scroll")].filter((one) => one.scrollWidth > one.clientWidth);
  seen.width = document.documentElement.clientWidth;
  seen.page = document.documentElement.scrollWidth;
  seen.select = [box("principle").left, box("principle").right];
  seen.shaded = wide.length > 0 && wide.every((one) => getComputedStyle(one).backgroundImage.includes("gradient"));
"""
    seen = ask(page_of(run), tmp_path, script, 420)
    assert seen["width"] <= 500 and seen["page"] <= seen["width"] and seen["shaded"]
    assert 0 <= seen["select"][0] < seen["select"][1] <= seen["width"]
    level = 'const [a, b] = ["principle", "text"].map((n) => tools("chains").elements[n].getBoundingClientRect());'
    level += "seen.level = [a.top - b.top, a.bottom - b.bottom];"
    assert ask(page_of(run), tmp_path, level)["level"] == [0, 0]
