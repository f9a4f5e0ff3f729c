"""Commands about what is there: checkpoints, constitutions, finished runs. Heavy imports stand inside them."""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from bylaw.recipe import AmendConfig
from bylaw.words import many, printable

_IDS = """ID is a prompt's id, for everything of it; PROMPT@ROUND, a round of its chain; PROMPT#N, a pair and its label;
PROMPT+N, a helpful sample; or ppo/ITERATION/PLACE, an episode. For prompt ids that look like one of these, write
prompt:, round:, pair: or helpful: in front. Records that no stage made have the name of their place in the run in
front: evaluation/PROMPT#N, amendments/HASH/PROMPT#N, judge/NAME/ID, behaviour/NAME/MODEL/PROMPT+N,
reward/helpful/ID. --json prints JSON."""

_WITHOUT = {
    "critique": "answers cannot be criticised or revised by it (`bylaw revise`)",
    "comparison": "answers cannot be compared by it (`bylaw label`, and all that follows)",
}
"""What cannot be done with a constitution that has no principle for a stage."""

_CONSTITUTION_HELP = """show FILE          its principles, to read
check FILE         is it in order? FILE may be default or village
diff OLD NEW       what changed, in words
import FILE ...    from the files of the Constitutional AI release, Hugging Face's JSON, numbered text, or Markdown
examples FILE      few-shot examples from such files
export FILE        in the form of others"""


def chat(args: list[str]) -> None:
    """Talk to a checkpoint, or to the last one of a run: bylaw chat FOLDER"""
    from bylaw import talk

    folder, rest = _folder(args, "bylaw chat FOLDER [flags]")
    config = tyro.cli(talk.ChatConfig, args=rest, prog="bylaw chat FOLDER", description=chat.__doc__)
    assert folder is not None
    talk.chat(folder, config)


def amend(args: list[str]) -> None:
    """What an amended constitution would change in a run, and the run made by it: bylaw amend RUN NEW.toml"""
    usage = "bylaw amend RUN NEW.toml [flags]"
    run, rest = _folder(args, usage)
    named = bool(rest) and not rest[0].startswith("-")
    if run is not None and not named and not {"-h", "--help"} & set(rest):
        raise ValueError(f"a constitution is wanted: {usage}")
    config = tyro.cli(AmendConfig, args=rest[named:], prog=usage.split(" [")[0], description=amend.__doc__)
    assert run is not None
    from bylaw.amend import amend as work  # torch: only once the mistakes are out of the way

    work(run, rest[0], config)


def experiment(args: list[str]) -> None:
    """A finding of the papers, looked for on the village: bylaw experiment NAME --runs FOLDER"""
    from bylaw.experiment import NAMES, ExperimentConfig, measure

    about = f"{experiment.__doc__}\n\nNAME is one of {', '.join(NAMES)}."
    helped = bool({"-h", "--help"} & set(args))
    name = "" if not args or args[0].startswith("-") else args[0]
    if name not in NAMES and not helped:
        raise ValueError(f"experiment {name!r} is not known; allowed, in front of the flags: {', '.join(NAMES)}")
    config = tyro.cli(
        ExperimentConfig, args=args[bool(name) :], prog=f"bylaw experiment {name or 'NAME'}", description=about
    )
    print(measure(name, config))


def bench(args: list[str]) -> None:
    """How fast your own checkpoint samples here, against Transformers: bylaw bench engine FOLDER"""
    usage = "bylaw bench engine FOLDER [flags]"
    if args[:1] in (["-h"], ["--help"]):
        print(f"usage: {usage}\n\n{bench.__doc__}\n\n`bylaw bench engine --help` tells more.")
        return
    if args[:1] != ["engine"]:
        raise ValueError(f"got {args[:1]}; allowed: {usage}")
    from bylaw.benchmarks.engine_config import EngineConfig

    folder, rest = _folder(args[1:], usage)
    default = EngineConfig(model=folder)
    config = tyro.cli(
        EngineConfig, default=default, args=rest, prog="bylaw bench engine FOLDER", description=bench.__doc__
    )
    from bylaw.benchmarks.engine import main as work  # torch: only once the mistakes are out of the way

    sys.exit(work(config))


def constitution(args: list[str]) -> None:
    """Read, compare and convert constitutions: bylaw constitution show|check|diff|import|examples|export"""
    from bylaw import exports
    from bylaw.constitution import STAGES, describe, load_constitution

    name, rest = (args[0], args[1:]) if args else ("", [])
    others: dict[str, tuple[type, Callable[[Any], None]]] = {
        "diff": (exports.DiffConfig, exports.diff_constitutions),
        "import": (exports.ImportConfig, exports.import_constitution_files),
        "examples": (exports.ExamplesConfig, exports.import_example_file),
        "export": (exports.ExportConstitutionConfig, exports.export_constitution),
    }
    if name in others:
        config, work = others[name]
        work(tyro.cli(config, args=rest, prog=f"bylaw constitution {name}"))
        return
    if {"-h", "--help"} & set(args):
        print(f"usage: bylaw constitution COMMAND ...\n\n{constitution.__doc__}\n\n{_CONSTITUTION_HELP}")
        return
    if len(args) != 2 or name not in ("show", "check"):
        raise ValueError(
            f"got {' '.join(args) or 'nothing'}; allowed: show FILE, check FILE, where FILE may be default or village, "
            f"or {', '.join(others)} with --help"
        )
    found = load_constitution(args[1])
    if name == "show":
        print(printable(describe(found)), end="")
    else:
        print(f"{args[1]}: {many(len(found.principles), 'principle')}, all in order; hash {found.hash}")
        for stage in STAGES:
            if not any(stage in principle.stages for principle in found.principles):
                print(f"none is for the stage {stage!r}: {_WITHOUT[stage]}")


def export(args: list[str]) -> None:
    """The labels or chains of a run in the form of others: bylaw export RUN --format NAME --out FILE"""
    from bylaw.exports import ExportConfig, export_run

    export_run(tyro.cli(ExportConfig, args=args, prog="bylaw export", description=export.__doc__))


def import_preferences(args: list[str]) -> None:
    """Preferences from elsewhere as our records: bylaw import FILE --out preferences.jsonl"""
    from bylaw.exports import ImportRowsConfig, import_rows

    import_rows(tyro.cli(ImportRowsConfig, args=args, prog="bylaw import", description=import_preferences.__doc__))


def attribution(args: list[str]) -> None:
    """What each principle of a run drew, changed and decided: bylaw attribution RUN [--json]"""
    run, as_json = _reading(args, "attribution", attribution)
    if run is None:
        return
    _warn(run)
    from dataclasses import asdict

    from bylaw.attribution import attribute_run, describe_attribution

    found = attribute_run(run)
    print(json.dumps(asdict(found), indent=2) if as_json else printable(describe_attribution(found)))


def trust(args: list[str]) -> None:
    """How far the judge of a run can be trusted: bylaw trust RUN [--json]"""
    run, as_json = _reading(args, "trust", trust)
    if run is None:
        return
    _warn(run)
    from bylaw.ledger import Ledger
    from bylaw.rlaif.trust import describe_trust
    from bylaw.rlaif.trust import trust as measure

    preferences = Ledger(run).preferences
    if not preferences:
        raise FileNotFoundError(f"{run / 'label' / 'preferences.jsonl'}: no labels; `bylaw label` writes them")
    measured = measure(list(preferences.values()))
    print(json.dumps(measured, indent=2) if as_json else printable(describe_trust(measured)))


def judge(args: list[str]) -> None:
    """How well a checkpoint judges multiple-choice questions with known answers: bylaw judge FOLDER FILE"""
    from bylaw.judging import JudgeConfig
    from bylaw.judging import judge as work

    usage = "bylaw judge FOLDER FILE"
    folder, rest = _folder(args, f"{usage} [flags]")
    if folder and (not rest or rest[0].startswith("-")) and not {"-h", "--help"} & set(rest):
        raise ValueError(f"a file of questions or of pairs is wanted after {folder}: {usage} [flags]")
    file, rest = _folder(rest, f"{usage} [flags]") if folder else (None, rest)
    about = f"{judge.__doc__}\n\n{inspect.getdoc(JudgeConfig)}"
    config = tyro.cli(JudgeConfig, args=rest, prog=usage, description=about)
    assert folder is not None and file is not None
    work(folder, file, config)


def evaluate(args: list[str]) -> None:
    """Does a checkpoint keep its constitution, and still help: bylaw evaluate FOLDER --harmful FILE --benign FILE"""
    from bylaw.evaluation import EvaluateConfig
    from bylaw.evaluation import evaluate as work

    folder, rest = _folder(args, "bylaw evaluate FOLDER [flags]")
    config = tyro.cli(EvaluateConfig, args=rest, prog="bylaw evaluate FOLDER", description=evaluate.__doc__)
    assert folder is not None
    work(folder, config)


def trace(args: list[str]) -> None:
    """From a record back to its principle, and on to what it trained: bylaw trace RUN ID [--json]"""
    usage = "bylaw trace RUN ID [--json]"
    if {"-h", "--help"} & set(args):
        print(f"usage: {usage}\n\n{trace.__doc__}\n\n{_IDS}")
        return
    plain = [arg for arg in args if arg != "--json"]
    if len(plain) != 2:
        raise ValueError(f"got {' '.join(args) or 'nothing'}; allowed: {usage}. {' '.join(_IDS.split())}")
    _warn(Path(plain[0]))
    from bylaw.ledger import Ledger
    from bylaw.trace import Tracer
    from bylaw.trace_text import describe

    found = Tracer(Ledger(Path(plain[0]))).trace(plain[1])
    print(json.dumps(found, indent=2) if "--json" in args else describe(found))


def check(args: list[str]) -> None:
    """Was anything in a run folder changed since it was written: bylaw check RUN"""
    run, rest = _folder(args, "bylaw check RUN")
    if run is None:
        print(f"usage: bylaw check RUN\n\n{check.__doc__}\n\nExit code 1 if anything is wrong.")
        return
    if rest:
        raise ValueError(f"got {rest} after {run}; allowed: nothing")
    from bylaw.check import check as work
    from bylaw.check import report as told

    found = work(run)
    print(told(run, found))
    if found.problems:
        sys.exit(1)


def report(args: list[str]) -> None:
    """One HTML page about a run, for people: bylaw report RUN [--out FILE]"""
    from bylaw.report import ReportConfig, write_report

    run, rest = _folder(args, "bylaw report RUN [flags]")
    config = tyro.cli(ReportConfig, args=rest, prog="bylaw report RUN", description=report.__doc__)
    assert run is not None
    print(write_report(run, config))


def kernels(args: list[str]) -> None:
    """Which implementation of each operation runs on this machine, and why: bylaw kernels"""
    if {"-h", "--help"} & set(args):
        print(f"usage: bylaw kernels\n\n{kernels.__doc__}")
        return
    if args:
        raise ValueError(f"got {args}; allowed: no arguments")
    import torch

    from bylaw.explain import explain

    print(explain(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def _warn(run: Path) -> None:
    """Say, beside what is printed, that it may be made of files which somebody has changed."""
    from bylaw.sums import altered

    if found := altered(run):
        print(
            f"note: changed after they were written: {printable(', '.join(found))}; `bylaw check` tells more",
            file=sys.stderr,
        )


def _folder(args: list[str], usage: str) -> tuple[Path | None, list[str]]:
    if args and not args[0].startswith("-"):
        return Path(args[0]), args[1:]
    if {"-h", "--help"} & set(args):
        return None, args
    raise ValueError(f"a folder is wanted first, before any flag: {usage}")


def _reading(args: list[str], name: str, command: Callable[[list[str]], None]) -> tuple[Path | None, bool]:
    """The run folder of a command that only reads one, and whether JSON is wanted; no folder when help is."""
    usage = f"bylaw {name} RUN [--json]"
    run, rest = _folder(sorted(args, key=lambda arg: arg.startswith("-")), usage)  # in whatever order
    if run is None or {"-h", "--help"} & set(rest):
        print(f"usage: {usage}\n\n{command.__doc__}")
        return None, False
    if rest not in ([], ["--json"]):
        raise ValueError(f"got {rest}; allowed: {usage}")
    return run, bool(rest)
