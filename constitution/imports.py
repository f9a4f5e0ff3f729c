"""Constitutions from files of other forms, and back into them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bylaw.constitution.draft import Imported, check_text, merge, read_json, read_text, table
from bylaw.constitution.hugging_face import dump_hugging_face, hugging_face_examples, read_hugging_face
from bylaw.constitution.plain import read_markdown, read_numbered
from bylaw.constitution.released import dump_comparisons, dump_critiques, read_comparisons, read_critiques
from bylaw.constitution.released_texts import Example, comparison_examples, critique_examples, read_chains
from bylaw.constitution.schema import Constitution, Stage, Templates
from bylaw.constitution.write import dump_constitution

WRITERS: dict[str, Callable[[Constitution], str]] = {
    "anthropic-critiques": dump_critiques,
    "anthropic-comparisons": dump_comparisons,
    "hugging-face": dump_hugging_face,
}
"""By the names that the command line knows the forms by."""
_REQUESTS = ("critique", "revision")
_HELD: dict[str, tuple[Stage, tuple[str, ...], tuple[str, ...], str]] = {
    "anthropic-critiques": ("critique", _REQUESTS, _REQUESTS, "ids and requests"),
    "anthropic-comparisons": ("comparison", ("comparison",), ("question",), "questions, without ids"),
    "hugging-face": ("critique", _REQUESTS, _REQUESTS, "requests, without ids"),
}
"""Of each form: its stage, the principles' own requests and the templates that reach it, and what it holds."""

_MARKDOWN = (".md", ".markdown")
_ALLOWED = (
    "CritiqueRevisionInstructions.json, RLMadisonInstructions.json or *_SLMADISON.jsonl of the Constitutional AI "
    "release, Hugging Face's constitution JSON, numbered text, or Markdown"
)


def import_constitution(paths: Sequence[Path]) -> Imported:
    """A constitution from one file, or from several of which each has a part (the release has its requests for
    critiques in one and those for comparisons in another).

    FileNotFoundError; ValueError naming file and place for whatever cannot be read.
    """
    if not paths:
        raise ValueError(f"no file to import; give one or more: {_ALLOWED}")
    imported = merge([_import_one(path) for path in paths], " and ".join(path.stem for path in paths))
    dump_constitution(imported.constitution)  # what no TOML file could hold is refused here
    return imported


def not_held(constitution: Constitution, form: str) -> list[str]:
    """What a form of `WRITERS` has no place for, of this constitution."""
    stage, own, templates, holds = _HELD[form]
    used = [p for p in constitution.principles if stage in p.stages]
    others = [p.id for p in constitution.principles if stage not in p.stages]
    lost = [name for name in ("critique", "revision", "comparison") if name not in own]
    given, usual = asdict(constitution.templates), Templates()
    changed = [name for name, text in given.items() if name not in templates and text != getattr(usual, name)]
    counts = {
        f"principles that are not of the stage {stage}: {', '.join(others)}": len(others),
        "weights": sum(p.weight != 1 for p in used),
        "lists of tags": sum(bool(p.tags) for p in used),
        "requests of a principle's own, for the other stage": sum(
            bool(getattr(p, name)) for p in used for name in lost
        ),
        f"templates: {', '.join(changed)}": len(changed),
    }
    return [
        f"the form holds {holds}: no titles, statements, sources, licence or preamble",
        *(f"left out: {count} {what}" for what, count in counts.items() if count),
    ]


def import_examples(path: Path) -> tuple[Stage, Sequence[Example | str]]:
    """ "critique" or "comparison", and the examples of a few-shot file of the release or of the chats of a Hugging
    Face constitution, or why one of them is none. ValueError naming file and place, also where there are none.
    """
    value = read_json(read_text(path), str(path))
    if isinstance(value, dict) and "constitutions" in value:
        if examples := hugging_face_examples(value, path):
            return "critique", examples
        raise ValueError(f"{path}: no example in it: system_chat is missing or empty")
    if isinstance(value, list) and value and isinstance(value[0], str):
        return "critique", critique_examples(value, path)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "comparison", comparison_examples(value, path)
    raise ValueError(
        f"{path}: not a file of examples; allowed: CritiqueRevisionFewShotPrompts.json, RLMadisonFewShotPrompts.json, "
        "RLMadisonPrecogFewShotPrompts.json, or Hugging Face's constitution JSON with a system_chat"
    )


def _import_one(path: Path) -> Imported:
    if path.suffix == ".jsonl":
        return read_chains(path)[1]
    text = read_text(path)
    if path.suffix == ".json":
        return _import_json(read_json(text, str(path)), path)
    check_text(text, str(path))
    return read_markdown(text, path) if path.suffix in _MARKDOWN else read_numbered(text, path)


def _import_json(value: Any, path: Path) -> Imported:
    if isinstance(value, dict) and "constitutions" in value:
        return read_hugging_face(value, path)
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            table(entry, ("prompt", "edit_request"), f"{path}: {key}")
        return read_critiques(value, path)
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        if isinstance(value[0], str) and "CritiqueRequest:" in value[0]:
            raise ValueError(f"{path}: these are few-shot examples, not principles; read them as examples instead")
        return read_comparisons(value, path)
    raise ValueError(f"{path}: no constitution in a form that is known. Allowed: {_ALLOWED}")
