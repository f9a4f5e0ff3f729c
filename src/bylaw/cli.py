"""The command line. Heavy imports stand inside the commands, so that help comes at once."""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from bylaw import __version__, commands
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
        print(f"bylaw {where}: {' '.join(_said(error).splitlines())}", file=sys.stderr)
        code = USAGE_ERROR
    except KeyboardInterrupt:
        code = 130
    if code:  # out here the error is gone, and with it what its traceback holds: process groups, models
        sys.exit(code)


def _said(error: Exception) -> str:
    """The message of an error; the operating system's without its number."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        files = " -> ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
        return f"{files}: {error.strerror.lower()}" if files else error.strerror
    return str(error)


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
            if not args or _is_recipe_last(args):
                usage = f"bylaw {command} RECIPE.toml [flags]"
                raise ValueError(f"a recipe is wanted first, before any flag: {usage}; `--help` lists every setting")
            recipe = tyro.cli(Recipe, args=args, prog=prog, description=about)
    from bylaw.pipeline import run_pipeline  # torch: only once the help and the mistakes are out of the way
    from bylaw.told import next_commands

    run_pipeline(recipe, names or recipe.stages)
    if os.environ.get("RANK", "0") == "0" and not names:
        print(next_commands(recipe.out))


def _is_recipe_last(args: list[str]) -> bool:
    """Whether arguments that begin with a flag end with a recipe: a TOML file that is no flag's value."""
    return len(args) > 1 and args[-1].endswith(".toml") and not args[-2].startswith("-")


def _stage_command(names: Sequence[str], command: str, summary: str) -> Callable[[list[str]], None]:
    def run(args: list[str]) -> None:
        _stages(names, command, args)

    run.__doc__ = summary
    return run


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
    "chat": commands.chat,
    "amend": commands.amend,
    "experiment": commands.experiment,
    "bench": commands.bench,
    "constitution": commands.constitution,
    "export": commands.export,
    "import": commands.import_preferences,
    "attribution": commands.attribution,
    "trust": commands.trust,
    "judge": commands.judge,
    "evaluate": commands.evaluate,
    "trace": commands.trace,
    "check": commands.check,
    "report": commands.report,
    "kernels": commands.kernels,
}
