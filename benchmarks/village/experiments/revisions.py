"""What critique and revision do to the base's answers on held-out asks (arXiv 2212.08073, section 3.5)."""

from dataclasses import replace

from bylaw.benchmarks.village.evaluate import mean, revision_curve, verdict_of
from bylaw.benchmarks.village.experiments.bench import HARMFUL, Bench, Row
from bylaw.benchmarks.village.rules import ALL_KINDS, STATEMENTS
from bylaw.constitution.schema import Constitution, Principle
from bylaw.inputs import Run
from bylaw.model.records import Record, read_records
from bylaw.sl_cai.revise import Reviser, revise


def by_number(bench: Bench) -> list[Row]:
    """Harmlessness after 0 to 4 revisions."""
    return _rows(bench, _chains(bench, "revisions"), "critiqued")


def critiqued_or_direct(bench: Bench) -> list[Row]:
    """Revisions after a critique, and revisions that are asked for at once."""
    direct = _chains(bench, "direct", critiques=False)
    return _rows(bench, _chains(bench, "revisions"), "critiqued") + _rows(bench, direct, "direct")


def by_principles(bench: Bench) -> list[Row]:
    """Critiques by 1, 2 and 3 principles that each forbid every harm, as the paper's are alike in breadth; and by the
    first 4 and all 7 that forbid in the constitution, of which the later cover fewer harms.
    """
    constitution = Run(bench.recipe).constitution
    broad = {f"{count} on every harm": _broad(constitution, count) for count in (1, 2, 3)}
    first = {f"first {count}": replace(constitution, principles=constitution.principles[:count]) for count in (4, 7)}
    return [
        row
        for name, one in (broad | first).items()
        for row in _rows(bench, _chains(bench, f"principles-{name.replace(' ', '-')}", one), name)
    ]


def _broad(constitution: Constitution, count: int) -> Constitution:
    """`count` principles that forbid every harm, each in other words."""
    statements = [form.format(kinds=ALL_KINDS) for form in STATEMENTS["forbids"][:count]]
    named = [(f"broad-{n}", statement[0].upper() + statement[1:]) for n, statement in enumerate(statements, 1)]
    principles = (
        Principle(id=id, title=id, statement=statement, sources=("an experiment",)) for id, statement in named
    )
    return replace(constitution, principles=tuple(principles))


def _chains(bench: Bench, name: str, constitution: Constitution | None = None, critiques: bool = True) -> list[Record]:
    run = Run(bench.recipe)
    config = replace(run.recipe.revise, critiques=critiques)
    sampler = run.sampler(run.model(run.recipe.base), run.recipe.base, config)
    path = bench.folder / f"{name}.jsonl"
    revise(Reviser(sampler=sampler, constitution=constitution or run.constitution, config=config), HARMFUL, path)
    return read_records(path)


def _rows(bench: Bench, chains: list[Record], variant: str) -> list[Row]:
    curve = revision_curve(chains)
    return [
        {"variant": variant, "seed": bench.seed, "revisions": n, "harmless": curve[n]} | _kinds_of_text(chains, n)
        for n in range(len(curve))
    ]


def _kinds_of_text(chains: list[Record], n: int) -> dict[str, float]:
    """Of the texts after n revisions: those that decline with the true reason, broken ones, distinct ones."""
    texts = [chain["rounds"][n - 1]["revision"]["text"] if n else chain["answer"]["text"] for chain in chains]
    verdicts = [verdict_of(chain["id"], text) for chain, text in zip(chains, texts, strict=True)]
    return {
        "declined_with_reason": mean([one == "declined" for one in verdicts]),
        "broken": mean([one == "broken" for one in verdicts]),
        "distinct": len(set(texts)) / len(texts),
    }
