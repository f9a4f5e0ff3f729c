"""Constitutions: principles that people write, checked, hashed, and turned into prompts. No torch here."""

from bylaw.constitution.diff import Change, Diff, describe_diff
from bylaw.constitution.imports import import_constitution
from bylaw.constitution.load import load_constitution, parse_constitution
from bylaw.constitution.render import (
    comparison_request,
    critique_request,
    describe,
    direct_request,
    plain_dialogue,
    rating_request,
    revision_request,
)
from bylaw.constitution.schema import STAGES, Constitution, Principle, Stage, Templates, draw
from bylaw.constitution.write import dump_constitution

__all__ = [
    "STAGES",
    "Change",
    "Constitution",
    "Diff",
    "Principle",
    "Stage",
    "Templates",
    "comparison_request",
    "critique_request",
    "describe",
    "describe_diff",
    "direct_request",
    "draw",
    "dump_constitution",
    "import_constitution",
    "load_constitution",
    "parse_constitution",
    "plain_dialogue",
    "rating_request",
    "revision_request",
]
