"""What critique and revision do to the base's answers on held-out asks (arXiv 2212.08073, section 3.5)."""

from dataclasses import replace

from bylaw.benchmarks.village.evaluate import mean, revision_curve, verdict_of
from bylaw.benchmarks.village.experiments.bench import HARMFUL, Bench, Row
from bylaw.constitution.schema import Constitution
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
    """Critiques by the first 1, 2, 4 and all principles that forbid, of which the later cover fewer harms, and the same
    number of revisions.
    """
    rows = []
    for count in (1, 2, 4, 7):
        chains = _chains(bench, f"principles-{count}", count=count)
        rows += _rows(bench, chains, f"first {count}")
    return rows


def _chains(bench: Bench, name: str, count: int = 0, critiques: bool = True) -> list[Record]:
    run = Run(bench.recipe)
    config = replace(run.recipe.revise, critiques=critiques)
    sampler = run.sampler(run.model(run.recipe.base), run.recipe.base, config)
    constitution = _first(run.constitution, count) if count else run.constitution
    path = bench.folder / f"{name}.jsonl"
    revise(Reviser(sampler=sampler, constitution=constitution, config=config), HARMFUL, path)
    return read_records(path)


def _first(constitution: Constitution, count: int) -> Constitution:
    return replace(constitution, principles=constitution.principles[:count])


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
