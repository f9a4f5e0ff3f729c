"""Constitutions that people wrote as numbered text or as Markdown."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from bylaw.constitution.draft import Imported, assemble, check_text, one_line, short_title, slug
from bylaw.constitution.schema import Principle

_NUMBERED = re.compile(r"\s*\(?(\d{1,4})[.)]\s+(\S.*)")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*")
_ITEM = re.compile(r"([ \t]*)(?:[-*+]|\d{1,4}[.)])\s+(?:\[[ xX]\]\s+)?(\S.*)")
_UNDERLINE = re.compile(r" {0,3}(={2,}|-{2,})\s*")
_CODE = 4  # spaces in front of a line from which it is no item, unless it stands below one
_DEEPER = 2  # from which an item below another is part of it
_NOT_TEXT = re.compile(r"\s*(?:\||>|<!--|!\[|(?:-{3,}|\*{3,}|_{3,}|={3,})\s*$)")
# Emphasis is a title only where a mark parts it from the rest: "**Never** lie" is a statement.
_LEAD = re.compile(r"(\*\*|__)((?:(?!\1).)+?)(?:[:.]\1\s*[:.]?|\1\s*(?:[:.]|-+\s|[\u2013\u2014]))\s*(\S.*)", re.DOTALL)
_LINK = re.compile(r"\[([^\]]*)\]\([^)\s]*\)")
_EMPHASIS = re.compile(r"(\*\*|__|`|(?<!\w)[*_](?=\S))(.+?)\1")


def read_numbered(text: str, path: Path) -> Imported:
    """Plain text with a principle at each "1. ...", "2) ..." or "(3) ...". A line below it goes on with the principle;
    what stands above the first is the preamble; after an empty line, only an indented one goes on. ValueError when no
    line is numbered.
    """
    preamble: list[str] = []
    found: list[tuple[int, list[str]]] = []
    left: list[int] = []
    after_gap = False
    for number, line in enumerate(text.split("\n"), 1):
        if item := _NUMBERED.fullmatch(line):
            found.append((number, [item[2]]))
        elif not found:
            preamble.append(line)
        elif line.strip() and after_gap and not line[0].isspace():
            left.append(number)
        elif line.strip():
            found[-1][1].append(line)
        # A line that was left out leaves out what goes on from it.
        after_gap = not line.strip() or (bool(left) and left[-1] == number)
    if not found:
        raise ValueError(f"{path}: no line is numbered; allowed: principles that begin '1. ...' or '1) ...'")
    principles = [_principle(" ".join(lines), number, path) for number, lines in found]
    notes = [f"{len(left)} lines between and below the numbers left out: {_lines(left)}"] if left else []
    return assemble(principles, "numbered text", path, notes, preamble=_paragraphs(preamble, path))


def read_markdown(text: str, path: Path) -> Imported:
    """Markdown: headings are titles, the bullets or numbered items below them statements, each with the items further
    in below it; a heading without items has its paragraphs as statements. A first heading above all others names the
    document, and the paragraphs below it are the preamble if principles come elsewhere. Tables, quotes, pictures, code
    and front matter are left out, and so are paragraphs beside items; all are counted. ValueError when nothing makes a
    principle.
    """
    sections, skipped = _sections(text)
    name, above = "", []
    if len(sections) > 1 and not sections[0].title and not sections[0].items:
        above, sections = sections[0].paragraphs, sections[1:]
    if _names_document(sections):
        head = sections[0]
        name = head.title
        if not head.items and any(section.blocks for section in sections[1:]):
            above, sections = [*above, *head.paragraphs], sections[1:]
    beside = [(n, one) for section in sections if section.items for n, one in section.paragraphs]
    if name and sections and sections[0].title == name and sections[0].items:
        above = [*above, *sections[0].paragraphs]
        beside = [one for one in beside if one not in sections[0].paragraphs]
    principles = [p for section in sections for p in _section_principles(section, section.title == name, path)]
    notes = (
        [f"{len(skipped)} lines of tables, quotes, code, rules and front matter left out: {_lines(skipped)}"]
        if skipped
        else []
    )
    if beside:
        notes.append(f"{len(beside)} paragraphs beside items left out: {_lines([n for n, _ in beside])}")
    preamble = check_text("\n\n".join(one for _, one in above), f"{path}: preamble") if above else ""
    return assemble(principles, "Markdown", path, notes, name=name, preamble=preamble)


@dataclass
class _Section:
    """What stands below a heading, each block with its line."""

    level: int = 7
    title: str = ""
    items: list[tuple[int, str]] = field(default_factory=list)
    paragraphs: list[tuple[int, str]] = field(default_factory=list)

    @property
    def blocks(self) -> list[tuple[int, str]]:
        return self.items or self.paragraphs


def _sections(text: str) -> tuple[list[_Section], list[int]]:
    """The sections, and the numbers of the lines that are no text."""
    lines = text.split("\n")
    front = _front_matter(lines)
    found = _Found(skipped=list(range(1, front + 1)))
    for number, line in enumerate(lines[front:], front + 1):
        found.take(number, line)
    return [s for s in found.sections if s.title or s.blocks], found.skipped


@dataclass
class _Found:
    """What has been read so far, and the blocks whose last one the next line may go on with."""

    skipped: list[int]
    sections: list[_Section] = field(default_factory=lambda: [_Section()])
    blocks: list[tuple[int, str]] | None = None
    indent: int = 0
    fenced: bool = False
    gap: bool = False

    def take(self, number: int, line: str) -> None:
        fence, last = line.lstrip().startswith(("```", "~~~")), self.sections[-1]
        if self.fenced or fence:
            self.fenced ^= fence
            self._skip(number)
        elif self.blocks and self.blocks is last.paragraphs and (under := _UNDERLINE.fullmatch(line)):
            self._head(1 if "=" in under[1] else 2, self.blocks.pop()[1])
        elif _NOT_TEXT.match(line):
            self._skip(number)
        elif heading := _HEADING.fullmatch(line):
            self._head(len(heading[1]), heading[2])
        elif line.strip() and not self._item(number, line):
            self._text(number, line)
        elif not line.strip() and self.blocks is not last.items:
            self.blocks = None
        self.gap = not line.strip()

    def _skip(self, number: int) -> None:
        self.skipped.append(number)
        self.blocks = None

    def _head(self, level: int, title: str) -> None:
        self.sections.append(_Section(level, one_line(_unmarked(title))))
        self.blocks = None

    def _item(self, number: int, line: str) -> bool:
        """Take an item; whether it is one. One that stands further in than the item above is part of that."""
        item, items = _ITEM.fullmatch(line), self.sections[-1].items
        depth = len(item[1].expandtabs(_CODE)) if item else 0
        if item and items and self.blocks is items and depth >= self.indent + _DEEPER:
            start, above = items[-1]
            items[-1] = (start, f"{above}{'' if above.rstrip()[-1] in '.:;,!?' else ';'}\n{item[2]}")
        elif item and depth < _CODE:
            self.blocks, self.indent = items, depth
            items.append((number, item[2]))
        else:
            return False
        return True

    def _text(self, number: int, line: str) -> None:
        """An item goes on over lines, and over an empty one where the line is further in."""
        paragraphs = self.sections[-1].paragraphs
        if self.blocks and (self.blocks is paragraphs or line[0].isspace() or not self.gap):
            self.blocks[-1] = (self.blocks[-1][0], f"{self.blocks[-1][1]}\n{line}")
        else:
            self.blocks = paragraphs
            paragraphs.append((number, line))


def _front_matter(lines: list[str]) -> int:
    """How many lines, at the top, stand between two lines of dashes."""
    ends = [number for number, line in enumerate(lines[1:], 2) if line.rstrip() in ("---", "...")]
    return ends[0] if ends and lines[0].rstrip() == "---" else 0


def _names_document(sections: list[_Section]) -> bool:
    first = sections[0] if sections else _Section()
    return bool(first.title) and all(section.level > first.level for section in sections[1:])


def _section_principles(section: _Section, is_document: bool, path: Path) -> list[Principle]:
    """A heading is the title of the one statement below it; of several it is the tag."""
    alone = len(section.blocks) == 1 and not is_document
    tag = slug(section.title) if section.title and not alone and not is_document else ""
    return [_principle(text, line, path, section.title if alone else "", tag) for line, text in section.blocks]


def _principle(text: str, line: int, path: Path, title: str = "", tag: str = "") -> Principle:
    where = f"{path}:{line}"
    statement = check_text(text, where)
    if not title and (lead := _LEAD.fullmatch(statement)):
        title, statement = lead[2], lead[3]
    statement = one_line(_unmarked(statement))
    title = one_line(_unmarked(title)) or short_title(statement)
    if not any(letter.isalnum() for letter in statement):
        raise ValueError(f"{where}: {text[:40]!r} has no words in it, so that it says no principle; take it out")
    return Principle(
        id=slug(title),
        title=check_text(title, where),
        statement=check_text(statement, where),
        sources=(f"{path.name}, line {line}",),
        tags=(tag,) if tag else (),
    )


def _unmarked(text: str) -> str:
    """Text without Markdown's links and emphasis."""
    text, before = _LINK.sub(r"\1", text), ""
    while text != before:
        before, text = text, _EMPHASIS.sub(r"\2", text)
    return text.strip()


def _paragraphs(lines: list[str], path: Path) -> str:
    text = "\n".join(line.strip() for line in lines).strip()
    return check_text(text, f"{path}: preamble") if text else ""


def _lines(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:10]))
    return f"line{'s' if len(numbers) > 1 else ''} {shown}" + (" ..." if len(numbers) > 10 else "")
