"""Constitutions: principles that people write, checked, hashed, and turned into prompts. No torch here."""

from bylaw.constitution.load import load_constitution, parse_constitution
from bylaw.constitution.render import (
    comparison_request,
    critique_request,
    describe,
    plain_dialogue,
    revision_request,
)
from bylaw.constitution.schema import STAGES, Constitution, Principle, Stage, Templates, draw

__all__ = [
    "STAGES",
    "Constitution",
    "Principle",
    "Stage",
    "Templates",
    "comparison_request",
    "critique_request",
    "describe",
    "draw",
    "load_constitution",
    "parse_constitution",
    "plain_dialogue",
    "revision_request",
]
