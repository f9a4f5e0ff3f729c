"""What a constitution has models asked at each stage: all of it that can change what the stage makes."""

import re
from collections.abc import Collection

from bylaw.constitution.render import fill
from bylaw.constitution.schema import Constitution, Principle, Stage, digest

TEMPLATES: dict[Stage, tuple[str, ...]] = {
    "critique": ("critique", "revision", "direct"),
    "comparison": ("question", "comparison", "answer_prefix", "thought_prefix", "rating", "rating_prefix"),
}
"""Those whose text reaches a stage's prompts. Which of them a run uses depends on its settings."""
_OWN = {"critique": "critique", "revision": "revision", "question": "comparison"}
"""Which own request of a principle stands in for which template."""


def questions(
    constitution: Constitution, stage: Stage, used: Collection[str] | None = None
) -> dict[str, tuple[str, ...]]:
    """Per principle of the stage, by id: the text of every template that is `used` there (None: of all), filled in as
    far as it is the principle's own, with the rest left as {names}.
    """
    names = [name for name in TEMPLATES[stage] if used is None or name in used]
    chosen = [principle for principle in constitution.principles if stage in principle.stages]
    return {one.id: tuple(_asked(one, name, getattr(constitution.templates, name)) for name in names) for one in chosen}


def stage_hash(constitution: Constitution, stage: Stage, used: Collection[str] | None = None) -> str:
    """16 hex digits of sha256 over what is asked at a stage and in which proportions: another title that reaches no
    prompt, another order, or all weights times the same leave it, and with it the stage's output, as they were.

    ValueError as `Constitution.for_stage`.
    """
    weights = {one.id: one.weight for one in constitution.for_stage(stage)}
    asked, total = questions(constitution, stage, used), sum(weights.values())
    # Rounded: weights times three do not divide to the same last bits.
    return digest({id: [round(weights[id] / total, 12), *texts] for id, texts in asked.items()})


def _asked(principle: Principle, name: str, template: str) -> str:
    if name.endswith("_prefix"):
        return template
    text = (getattr(principle, _OWN[name]) if name in _OWN else "") or template
    open_names = {mark: f"{{{mark}}}" for mark in re.findall(r"\{(\w+)\}", text)}
    return fill(text, open_names | {"statement": principle.statement, "title": principle.title})
