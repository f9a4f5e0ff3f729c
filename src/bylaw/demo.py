"""`bylaw demo`: the pipeline on the village, then what changed, by the oracle, on asks held out of training."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bylaw.benchmarks.village.base import SHIPPED
from bylaw.benchmarks.village.evaluate import ask_of, behaviour, label_accuracy, prompts, revision_curve
from bylaw.benchmarks.village.rules import without
from bylaw.constitution.write import dump_constitution
from bylaw.judges import judge_reader
from bylaw.layout import EVALUATION, is_run
from bylaw.lock import only_one
from bylaw.model.data import Prompt
from bylaw.model.records import Record, read_records, write_atomic
from bylaw.model.settings import SamplingSettings
from bylaw.pipeline import Run, run_pipeline
from bylaw.recipe import DemoConfig, Recipe
from bylaw.report import ReportConfig, write_report
from bylaw.rlaif.compare import compare
from bylaw.rlaif.config import CompareConfig, LabelConfig, PPOConfig, RewardConfig
from bylaw.rlaif.label import label
from bylaw.rlaif.relabel import flips, movement, relabel
from bylaw.sl_cai.config import FinetuneConfig, ReviseConfig
from bylaw.sl_cai.revise import revise
from bylaw.sums import write_sums
from bylaw.words import printable

ROWS = 256
AMENDED = "danger"
MEASURES = (
    "complied_harmful", "refused_harmful", "refused_with_reason", "helpful_benign", "over_refused", "evaded", "broken"
)  # fmt: skip


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run the pipeline, measure, print the table and three chains, and write summary.json; returns the summary.

    Of torchrun's processes the first measures, when all have trained; the others return nothing.
    """
    recipe, first = village_recipe(config), os.environ.get("RANK", "0") == "0"
    if first:
        with only_one(config.out):
            write_village_prompts(recipe)
    manifests = run_pipeline(recipe)
    if not first:
        return {}
    start = time.time()
    with only_one(config.out / EVALUATION):
        summary = evaluate(Run(recipe), config.out / EVALUATION)
    summary["seconds"] = {name: manifest["seconds"] for name, manifest in manifests.items()}
    summary["seconds"]["evaluation"] = round(time.time() - start, 3)
    summary["seed"] = config.seed
    write_atomic(config.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    crossed_out = f"constitutions/{summary['amendment']['constitution']}.toml"
    write_sums(config.out, EVALUATION, "summary.json", crossed_out)
    page = write_report(config.out, ReportConfig())
    print(table(summary))
    chains = read_records(config.out / "revise" / "chains.jsonl")
    print("\nThree chains of the base model, each to its first revision:")
    print(*(printable(describe_chain(chain)) for chain in instructive(chains)), sep="\n")
    out = config.out
    print(f"\nCheckpoints: {recipe.base}, {out}/finetune/sl-cai, {out}/ppo/rl-cai. Numbers: {out}/summary.json")
    print(f"Read what happened, and by which principle: {page}")
    print(f"Talk to the last one: bylaw chat {config.out}/ppo/rl-cai")
    return summary


def village_recipe(config: DemoConfig) -> Recipe:
    """The recipe of the demo. Its prompts, the asks that are not held out, are files in the run's folder."""
    return Recipe(
        out=config.out,
        base=SHIPPED,
        prompts=config.out / "harmful.jsonl",
        helpful=str(config.out / "benign.jsonl"),
        constitution="village",
        seed=config.seed,
        device="cpu",
        revise=ReviseConfig(
            max_rows=ROWS,
            prompts_per_chunk=ROWS,
            temperature=0.5,
            helpful_samples=1,
            max_answer_tokens=40,
            max_critique_tokens=40,
            max_revision_tokens=40,
        ),
        finetune=FinetuneConfig(learning_rate=5e-4, batch_size=64, epochs=2, warmup_steps=5),
        compare=CompareConfig(max_rows=ROWS, prompts_per_chunk=ROWS, max_tokens=40),
        label=LabelConfig(principles="all", pairs_per_chunk=ROWS),
        reward=RewardConfig(learning_rate=1e-3, batch_size=64, epochs=4, warmup_steps=5),
        ppo=PPOConfig(
            learning_rate=7e-5,
            value_learning_rate=5e-4,
            iterations=40,
            rollouts=128,
            max_rows=128,
            max_tokens=40,
            epochs=2,
            minibatches=2,
            kl_coef=0.15,
            missing_eos_penalty=3.0,
            critic_warmup=2,
            warmup_steps=3,
            schedule="linear",
        ),
    )


def write_village_prompts(recipe: Recipe) -> None:
    """The prompt files of `village_recipe`: the asks that are not held out. ValueError, before any is written, for
    another file in the place of one, and for a run that is none of the village's.
    """
    texts = {
        recipe.prompts: _prompt_lines(prompts(heldout=False, harmful=True)),
        Path(recipe.helpful): _prompt_lines(prompts(heldout=False, harmful=False, forms=3)),
    }
    for path, text in texts.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise ValueError(f"{path} is none of the village's files; give the demo a folder of its own: --out FOLDER")
        if not path.exists() and is_run(recipe.out):
            raise ValueError(f"{recipe.out} is another run; give the demo a folder of its own: --out FOLDER")
    for path, text in texts.items():
        if not path.exists():
            write_atomic(path, text)


def write_prompts(path: Path, asked: Sequence[Prompt]) -> None:
    """Write a prompt file. The same prompts give the same bytes."""
    write_atomic(path, _prompt_lines(asked))


def _prompt_lines(asked: Sequence[Prompt]) -> str:
    return "".join(json.dumps({"id": prompt.id, "messages": prompt.messages}) + "\n" for prompt in asked)


def evaluate(run: Run, folder: Path) -> dict[str, Any]:
    """Measure the three checkpoints, the revisions and the labels on held-out asks. Nothing here is trained on."""
    recipe, settings = run.recipe, SamplingSettings(max_rows=ROWS)
    folders = {"base": recipe.base, "sl_cai": run.path("finetune", "sl-cai"), "rl_cai": run.path("ppo", "rl-cai")}
    summary: dict[str, Any] = {}
    for name, place in folders.items():
        sampler = run.sampler(run.model(place), place, settings)
        summary[name] = behaviour(sampler, 1, folder / f"{name}.jsonl", run.constitution)
    base = run.sampler(run.model(recipe.base), recipe.base, recipe.revise)
    reviser = run.reviser(base)
    revise(reviser, prompts(heldout=True, harmful=True), folder / "chains.jsonl")
    summary["revision_curve"] = revision_curve(read_records(folder / "chains.jsonl"))
    summary |= _label_quality(run, folder, folders["sl_cai"])
    return summary | {"named_right_principle": summary["rl_cai"]["named_right_principle"]}


def _label_quality(run: Run, folder: Path, policy: Path) -> dict[str, Any]:
    """Labels on pairs of answers to held-out asks, by all principles: against the oracle, and against the labels by a
    constitution from which one harm is crossed out.
    """
    config, pairs, labelled = run.recipe.compare, folder / "pairs.jsonl", folder / "preferences.jsonl"
    asked = prompts(heldout=True, harmful=True) + prompts(heldout=True, harmful=False, forms=1)
    compare(run.sampler(run.model(policy), policy, config), asked, pairs, config)
    judge = run.judge(judge_reader(run))
    counts = label(judge, read_records(pairs), labelled)
    preferences = read_records(labelled)
    amended, relabelled = replace(judge, constitution=without(run.constitution, AMENDED)), folder / "amended"
    kept = run.recipe.out / "constitutions" / f"{amended.constitution.hash}.toml"
    write_atomic(kept, dump_constitution(amended.constitution))
    amendment = relabel(judge, amended, preferences, relabelled / "preferences.jsonl")
    after = read_records(relabelled / "preferences.jsonl")
    flipped = flips(preferences, after)
    amendment |= movement(preferences, after) | {"crossed_out": AMENDED, "constitution": amended.constitution.hash}
    amendment["flips_there"] = sum(ask_of(one["prompt_id"]).kind == AMENDED for one in flipped)
    return label_accuracy(preferences, run.constitution) | {
        "labels": counts,
        "position_bias": counts["position_bias"],
        "flips_on_amendment": len(flipped) / len(preferences),
        "amendment": amendment,
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as a person reads it."""
    names = ("base", "sl_cai", "rl_cai")
    lines = ["", f"{'held-out asks':<22}" + "".join(f"{name:>9}" for name in names)]
    for measure in MEASURES:
        lines.append(f"{measure:<22}" + "".join(f"{percent(summary[name][measure]):>9}" for name in names))
    curve = "  ".join(f"{n}: {value:.1%}" for n, value in enumerate(summary["revision_curve"]))
    lines += ["", f"harmless after n revisions   {curve}"]
    flipped, firm = summary["flips_on_amendment"], summary["amendment"]["firm_flips"]
    lines += [
        f"judgements that agree with the oracle   {summary['label_accuracy']:.1%}, calibration error "
        f"{summary['label_ece']:.3f}, leaning to the first answer by {summary['position_bias']:+.3f}; whole labels "
        f"{summary['whole_label_accuracy']:.1%}",
        "where a principle takes no side between help and a refusal, the refusal's probability   "
        + ("unknown" if (silent := summary["silent_refusal"]) is None else f"{silent:.3f}"),
        f"refusals of the last model that name the harm at stake   {percent(summary['named_right_principle'])}",
        f"labels that flip where {AMENDED} is crossed out of the constitution   {flipped:.1%}, {firm} of them by more "
        "than a tie",
    ]
    seconds = "  ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    return "\n".join([*lines, f"seconds   {seconds}"])


def percent(share: float | None) -> str:
    """A share of something; a dash for a share of nothing."""
    return "-" if share is None else f"{share:.1%}"


def instructive(chains: Sequence[Record], count: int = 3) -> list[Record]:
    """Chains whose first revision differs from the answer, of different principles where there are such."""
    chosen: dict[str, Record] = {}
    for chain in chains:
        first = chain["rounds"][0]
        if first["revision"]["text"] != chain["answer"]["text"]:
            chosen.setdefault(first["principle"]["id"], chain)
    return list(chosen.values())[:count]


def describe_chain(chain: Record) -> str:
    """One chain up to its first revision."""
    first = chain["rounds"][0]
    return "\n".join(
        [
            "",
            f"prompt     {chain['prompt'][-1]['content']}",
            f"answer     {chain['answer']['text']}",
            f"principle  {first['principle']['id']}",
            f"critique   {first['critique']['text'] if first['critique'] else '(none)'}",
            f"revision   {first['revision']['text']}",
        ]
    )
