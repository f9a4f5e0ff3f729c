"""The command line. Heavy imports stand inside the commands, so that help comes at once."""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from bylaw import __version__
from bylaw.recipe import DemoConfig, Recipe, load_recipe
from bylaw.together import USAGE_ERROR, once_a_machine


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. What a user can mend is one line on stderr and exit code 2, never a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    # Before torch loads: OpenMP threads that wait spinning are many times slower when another program is busy.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return
    if args[0] == "--version":
        print(__version__)
        return
    name, rest, code = args[0], args[1:], 0
    try:
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"no such command{hint} Allowed: {', '.join(COMMANDS)}")
        COMMANDS[name](rest)
    except (ValueError, OSError, FloatingPointError) as error:
        rank = os.environ.get("RANK", "0")
        where = f"{name}, rank {rank}" if rank != "0" else name
        print(f"bylaw {where}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        code = USAGE_ERROR
    except KeyboardInterrupt:
        code = 130
    if code:  # out here the error is gone, and with it what its traceback holds: process groups, models
        sys.exit(code)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "bylaw: Constitutional AI from a written constitution to a trained checkpoint.\n\n" + "\n".join(
        [*lines, "", "`bylaw COMMAND --help` tells more. A stage command goes on where it was killed."]
    )


def _demo(args: list[str]) -> None:
    """The whole pipeline on the village, a small world that ships with bylaw: minutes on a laptop CPU."""
    config = tyro.cli(DemoConfig, args=args, prog="bylaw demo", description=_demo.__doc__)
    from bylaw.demo import demo

    demo(config)


def _stages(names: Sequence[str], command: str, args: list[str]) -> None:
    """Run the stages `names`; with none, all that the recipe asks for."""
    prog, about = f"bylaw {command} [RECIPE.toml]", COMMANDS[command].__doc__
    with once_a_machine():
        if args and not args[0].startswith("-"):
            recipe = tyro.cli(Recipe, default=load_recipe(Path(args[0])), args=args[1:], prog=prog, description=about)
        else:
            recipe = tyro.cli(Recipe, args=args, prog=prog, description=about)
    from bylaw.pipeline import run_pipeline  # torch: only once the help and the mistakes are out of the way

    for name, manifest in run_pipeline(recipe, names or recipe.stages).items():
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: {manifest['counts']} in {manifest['seconds']} s")


def _stage_command(names: Sequence[str], command: str, summary: str) -> Callable[[list[str]], None]:
    def run(args: list[str]) -> None:
        _stages(names, command, args)

    run.__doc__ = summary
    return run


def _chat(args: list[str]) -> None:
    """Talk to a checkpoint, or to the newest one of a run: bylaw chat FOLDER"""
    from bylaw.talk import ChatConfig, chat

    folder, rest = _folder(args, "bylaw chat FOLDER [flags]")
    config = tyro.cli(ChatConfig, args=rest, prog="bylaw chat FOLDER", description=_chat.__doc__)
    assert folder is not None
    chat(folder, config)


def _folder(args: list[str], usage: str) -> tuple[Path | None, list[str]]:
    if args and not args[0].startswith("-"):
        return Path(args[0]), args[1:]
    if {"-h", "--help"} & set(args):
        return None, args
    raise ValueError(f"a folder is wanted: {usage}")


def _constitution(args: list[str]) -> None:
    """Read a constitution: bylaw constitution show|check FILE (or default, village)"""
    from bylaw.constitution import describe, load_constitution

    if {"-h", "--help"} & set(args):
        print(f"usage: bylaw constitution show|check FILE\n\n{_constitution.__doc__}")
        return
    if len(args) != 2 or args[0] not in ("show", "check"):
        raise ValueError(f"got {args}; allowed: show FILE, check FILE, where FILE may be default or village")
    constitution = load_constitution(args[1])
    if args[0] == "show":
        print(describe(constitution), end="")
    else:
        print(f"{args[1]}: {len(constitution.principles)} principles, all in order; hash {constitution.hash}")


def _kernels(args: list[str]) -> None:
    """Which implementation of each operation runs on this machine, and why: bylaw kernels"""
    if {"-h", "--help"} & set(args):
        print(f"usage: bylaw kernels\n\n{_kernels.__doc__}")
        return
    if args:
        raise ValueError(f"got {args}; allowed: no arguments")
    import torch

    from bylaw.explain import explain

    print(explain(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def _bench(args: list[str]) -> None:
    """How fast your own checkpoint samples here, against Transformers: bylaw bench engine FOLDER"""
    usage = "bylaw bench engine FOLDER [flags]"
    if args[:1] in (["-h"], ["--help"]):
        print(f"usage: {usage}\n\n{_bench.__doc__}\n\n`bylaw bench engine --help` tells more.")
        return
    if args[:1] != ["engine"]:
        raise ValueError(f"got {args[:1]}; allowed: {usage}")
    from bylaw.benchmarks.engine_config import EngineConfig

    folder, rest = _folder(args[1:], usage)
    default = EngineConfig(model=folder)
    config = tyro.cli(
        EngineConfig, default=default, args=rest, prog="bylaw bench engine FOLDER", description=_bench.__doc__
    )
    from bylaw.benchmarks.engine import main as bench  # torch: only once the mistakes are out of the way

    sys.exit(bench(config))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "run": _stage_command((), "run", "All stages on your own checkpoint, constitution and prompts."),
    "revise": _stage_command(("revise",), "revise", "Answer each prompt, criticise and revise by principles."),
    "finetune": _stage_command(("finetune",), "finetune", "Supervised training on the revisions: the SL-CAI model."),
    "compare": _stage_command(("compare",), "compare", "Two answers of the SL-CAI model to each prompt."),
    "label": _stage_command(("label",), "label", "Which of two answers keeps the principles better."),
    "reward": _stage_command(("reward",), "reward", "Train a reward model on the labels."),
    "ppo": _stage_command(("ppo",), "ppo", "PPO against the reward model: the RL-CAI model."),
    "dpo": _stage_command(("dpo",), "dpo", "DPO on the labels, without a reward model: another last stage."),
    "chat": _chat,
    "bench": _bench,
    "constitution": _constitution,
    "kernels": _kernels,
}
