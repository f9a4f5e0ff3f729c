"""What differs between two constitutions, as data and in words that a person reads."""

import difflib
import math
import re
import textwrap
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal

from bylaw.constitution.asked import questions
from bylaw.constitution.schema import STAGES, Constitution, Principle, Stage, Templates

_HEAD = ("name", "version", "license", "preamble")
_COLUMNS = 100


@dataclass(frozen=True, kw_only=True)
class Change:
    """One principle that is not in both constitutions as it was. `fields` names what of a changed one differs."""

    id: str
    kind: Literal["added", "removed", "changed"]
    old: Principle | None
    new: Principle | None
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Two constitutions and what differs: principles, names of templates, names of the texts at the head of the file
    (which reach no prompt), and whether the principles that both have stand in another order.
    """

    old: Constitution
    new: Constitution
    changes: tuple[Change, ...]
    templates: tuple[str, ...]
    head: tuple[str, ...]
    reordered: bool

    def touched(self, stage: Stage, used: Collection[str] | None = None) -> tuple[str, ...]:
        """Ids of the principles of which a model is asked something else in `stage`, or that only one of the two
        uses there; `used` are the templates that count (None: all). Weights are not asked about: see `share`.
        """
        old, new = (questions(constitution, stage, used) for constitution in (self.old, self.new))
        return tuple(id for id in old | new if old.get(id) != new.get(id))

    def share(self, stage: Stage, id: str) -> tuple[float, float]:
        """The principle's part of the single draws of `stage`, before and now; 0 where it is not used."""
        return _share(self.old, stage, id), _share(self.new, stage, id)

    def reweighted(self, stage: Stage) -> tuple[str, ...]:
        """Ids, used in `stage` by both, whose own weight differs, and with it their part of the draws."""
        both = [one.id for one in self.changes if one.old and one.new and "weight" in one.fields]
        shares = {id: self.share(stage, id) for id in both}
        return tuple(id for id, (was, now) in shares.items() if was and now and not math.isclose(was, now))

    @property
    def reaches_prompts(self) -> bool:
        """Whether any model is asked something else, or in other proportions."""
        return any(self.touched(stage) or self.reweighted(stage) for stage in STAGES)


def diff(old: Constitution, new: Constitution) -> Diff:
    """What differs from `old` to `new`: principles, which their ids tell apart, in the order of `new` and then those
    that are gone; templates; head; order.
    """
    before, after = ({p.id: p for p in constitution.principles} for constitution in (old, new))
    changes = [_change(before.get(id), principle) for id, principle in after.items() if before.get(id) != principle]
    changes += [Change(id=id, kind="removed", old=p, new=None) for id, p in before.items() if id not in after]
    return Diff(
        old=old,
        new=new,
        changes=tuple(changes),
        templates=_unlike(old.templates, new.templates, tuple(f.name for f in fields(Templates))),
        head=_unlike(old, new, _HEAD),
        reordered=[id for id in before if id in after] != [id for id in after if id in before],
    )


def describe_diff(diff: Diff) -> str:
    """The differences as plain text of about 100 columns: [-words-] that went, {+words+} that came."""
    old, new = diff.old, diff.new
    lines = [f"{old.name}, version {old.version} ({old.hash}) to {new.name}, version {new.version} ({new.hash})"]
    lines += [_counts(diff)]
    for change in sorted(diff.changes, key=lambda c: ("removed", "added", "changed").index(c.kind)):
        lines += ["", *_describe_change(diff, change)]
    for name in diff.templates:
        lines += ["", f"template {name}, reworded", *_both(getattr(old.templates, name), getattr(new.templates, name))]
    for name in diff.head:
        lines += ["", f"{name}, which reaches no prompt", *_both(getattr(old, name), getattr(new, name))]
    return "\n".join([*lines, "", *_effect(diff)]) + "\n"


def mark_words(old: str, new: str) -> tuple[str, str]:
    """The two texts, the first with the words that went as [-words-], the second with those that came as {+words+}."""
    before, after = (re.findall(r"\S+|\s+", text) for text in (old, new))
    was, now = [], []
    for same, gone, come in _runs(before, after):
        was.append(gone if same else _mark(gone, "[-", "-]"))
        now.append(come if same else _mark(come, "{+", "+}"))
    return "".join(was), "".join(now)


def _runs(before: list[str], after: list[str]) -> list[tuple[bool, str, str]]:
    """Whether a stretch is the same in both, and its text in each. White space between two changes goes with them: a
    sentence that was said anew is one change, not one a word.
    """
    found: list[tuple[bool, str, str]] = []
    codes = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    for n, (kind, a, b, c, d) in enumerate(codes):
        gone, come = "".join(before[a:b]), "".join(after[c:d])
        same = kind == "equal" and (bool(gone.strip()) or n in (0, len(codes) - 1))
        if found and not same and not found[-1][0]:
            _, gone_before, come_before = found.pop()
            gone, come = gone_before + gone, come_before + come
        found.append((same, gone, come))
    return found


def _mark(text: str, opening: str, closing: str) -> str:
    """Marks go around the words: white space at the ends stays outside, so that lines and gaps stay as they were."""
    words = text.strip()
    return text.replace(words, f"{opening}{words}{closing}", 1) if words else text


def _change(old: Principle | None, new: Principle) -> Change:
    if old is None:
        return Change(id=new.id, kind="added", old=None, new=new)
    unlike = _unlike(old, new, tuple(f.name for f in fields(Principle)))
    return Change(id=new.id, kind="changed", old=old, new=new, fields=unlike)


def _unlike(one: object, two: object, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if getattr(one, name) != getattr(two, name))


def _share(constitution: Constitution, stage: Stage, id: str) -> float:
    weights = {p.id: p.weight for p in constitution.principles if stage in p.stages}
    return weights[id] / sum(weights.values()) if id in weights else 0.0


def _counts(diff: Diff) -> str:
    kinds = [change.kind for change in diff.changes]
    same = len(diff.new.principles) - kinds.count("added") - kinds.count("changed")
    counts = [f"{kinds.count(kind)} {kind}" for kind in ("removed", "added", "changed")]
    return f"principles: {', '.join(counts)}, {same} as before" + (", in another order" if diff.reordered else "")


def _describe_change(diff: Diff, change: Change) -> list[str]:
    one = change.new or change.old
    assert one is not None
    lines = [f"{change.kind}  {change.id}: {one.title}"]
    if change.old and change.new:
        return lines + [line for name in change.fields for line in _field(diff, change.old, change.new, name)]
    twin = _twin(diff, change)
    lines += _wrapped(one.statement)
    if twin:
        lines += [f"    says the same as {twin}, which is {'gone' if change.new else 'new'}: renamed"]
    return [*lines, f"    {_shares(diff, change.id)}"]


def _twin(diff: Diff, change: Change) -> str:
    """The id under which the other constitution says the very same, if it does."""
    one = change.new or change.old
    for other in diff.changes:
        two = other.old if change.new else other.new
        if one and two and other.kind not in (change.kind, "changed") and one.statement == two.statement:
            return other.id
    return ""


def _field(diff: Diff, old: Principle, new: Principle, name: str) -> list[str]:
    before, after = getattr(old, name), getattr(new, name)
    if name == "weight":
        return [f"    weight {before:g}, now {after:g}: {_shares(diff, new.id)}"]
    if isinstance(before, tuple):
        note = " (reach no prompt)" if name != "stages" else f": {_shares(diff, new.id)}"
        return _wrapped(f"{name} {', '.join(before) or 'none'}; now {', '.join(after) or 'none'}{note}")
    label = {"statement": "reworded", "title": "title"}.get(name, f"own request for the {name}")
    if not before or not after:
        text = f"taken out, so that the template asks: {before}" if before else f"added: {after}"
        return _wrapped(f"{label} {text}")
    return [f"    {label}", *_both(before, after)]


def _shares(diff: Diff, id: str) -> str:
    """Draws per stage before and now; said once where both stages have the same. A stage that never draws it is not
    named.
    """
    shares = {stage: diff.share(stage, id) for stage in STAGES}
    parts = {
        stage: "{:.1%} of the draws before, {:.1%} now".format(*both) for stage, both in shares.items() if any(both)
    }
    if len(parts) == len(STAGES) and len(set(parts.values())) == 1:
        return parts[STAGES[0]]
    return "; ".join(f"{stage}: {text}" for stage, text in parts.items())


def _both(old: str, new: str) -> list[str]:
    was, now = mark_words(old, new)
    return [*_wrapped(was, "was  "), *_wrapped(now, "now  ")]


def _wrapped(text: str, first: str = "") -> list[str]:
    """Lines of the text, each wrapped and indented; `first` stands before the first."""
    lines: list[str] = []
    for number, line in enumerate(text.split("\n")):
        lead = "    " + (first if number == 0 else " " * len(first))
        rest = "    " + " " * len(first)
        lines += textwrap.wrap(line, _COLUMNS, initial_indent=lead, subsequent_indent=rest, break_on_hyphens=False) or [
            ""
        ]
    return lines


def _effect(diff: Diff) -> list[str]:
    """What the change reaches, stage by stage."""
    if not diff.reaches_prompts:
        return ["nothing that reaches a prompt changed, nor how often a principle is drawn"]
    lines = []
    for stage in STAGES:
        touched, total = diff.touched(stage), sum(stage in p.stages for p in diff.new.principles)
        asked = f"asked otherwise, new or gone: {', '.join(touched)}" if touched else "asked as before"
        drawn = f"; re-weighted: {', '.join(ids)}" if (ids := diff.reweighted(stage)) else ""
        lines += [f"{stage} ({total} principles now): {asked}{drawn}"]
    return [part for line in lines for part in textwrap.wrap(line, _COLUMNS, subsequent_indent="    ")]
