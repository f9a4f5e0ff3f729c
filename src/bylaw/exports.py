"""What the commands do that read and write the formats of others. Heavy imports stand inside."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from bylaw.rlaif.formats import Counted

Rows = Literal[
    "trl-preference", "trl-conversational", "trl-unpaired", "trl-prompt-completion", "revisions", "anthropic-chains"
]
ConstitutionForm = Literal["anthropic-critiques", "anthropic-comparisons", "hugging-face"]


@dataclass
class DiffConfig:
    """What changed between two constitutions, in words."""

    old: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OLD")]
    """A TOML file, or the name of one that comes with bylaw."""
    new: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NEW")]
    """Another."""


@dataclass
class ImportConfig:
    """A constitution from files of another form, as TOML."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """JSON of the Constitutional AI release or of Hugging Face, numbered text or Markdown. Several make one."""
    out: Path | None = None
    """The TOML file to write; without it the text is printed."""


@dataclass
class ExamplesConfig:
    """Few-shot examples from files of the Constitutional AI release or of Hugging Face, as TOML."""

    file: tyro.conf.Positional[Path]
    """A few-shot JSON file of the release, or Hugging Face's constitution JSON with its chats."""
    constitution: Annotated[str, tyro.conf.arg(name="for")] = "default"
    """The constitution that they are to lie beside."""
    out: Path | None = None
    """The TOML file to write; without it the text is printed."""


@dataclass
class ExportConstitutionConfig:
    """A constitution in the form of others."""

    constitution: tyro.conf.Positional[str]
    """A TOML file, or the name of one that comes with bylaw."""
    format: ConstitutionForm = "anthropic-critiques"
    """The release's requests for critiques and revisions, or its questions about two answers; Hugging Face's JSON."""
    out: Path | None = None
    """The file to write; without it the text is printed."""


@dataclass
class ExportConfig:
    """The data of a run in the form of others."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    out: Path
    """The JSONL file to write."""
    format: Rows = "trl-preference"
    """The labels as TRL's preferences (text, or messages), or unpaired; the chains as prompts with their last revision,
    as preferences of the last revision over the first answer, or as the Constitutional AI release has them."""


@dataclass
class ImportRowsConfig:
    """Preferences from elsewhere as our records: TRL's forms; or chains of the Constitutional AI release."""

    file: tyro.conf.Positional[Path]
    """JSONL: prompt, chosen, rejected; chosen and rejected alone; prompt, completion, label; or *_SLMADISON.jsonl."""
    out: Path = field(default=Path("preferences.jsonl"))
    """The JSONL file to write."""
    soft: float | None = None
    """How sure it is that the chosen answer is better, 0.5 to 1; without it the rows' own p_chosen, else 1."""


def diff_constitutions(config: DiffConfig) -> None:
    """Print what changed. OSError or ValueError for a constitution that cannot be read."""
    from bylaw.constitution.diff import describe_diff, diff
    from bylaw.constitution.load import load_constitution
    from bylaw.words import printable

    print(printable(describe_diff(diff(load_constitution(config.old), load_constitution(config.new)))), end="")


def import_constitution_files(config: ImportConfig) -> None:
    """Write the constitution of the files, and tell what could not be taken."""
    from bylaw.constitution.imports import import_constitution
    from bylaw.constitution.write import dump_constitution

    imported = import_constitution(config.files)
    count = len(imported.constitution.principles)
    _put(
        dump_constitution(imported.constitution), config.out, [f"{count} principles, {imported.form}", *imported.notes]
    )


def import_example_file(config: ExamplesConfig) -> None:
    """Write the examples of a file, and tell what could not be taken."""
    from bylaw.constitution.foreign_examples import dump_examples
    from bylaw.constitution.imports import import_examples
    from bylaw.constitution.load import load_constitution

    kind, examples = import_examples(config.file)
    text, notes = dump_examples(kind, examples, load_constitution(config.constitution))
    _put(text, config.out, [f"{len(examples)} examples of a {kind} looked at", *notes])


def export_constitution(config: ExportConstitutionConfig) -> None:
    """Write a constitution in the form of others, and tell what has no place in it."""
    from bylaw.constitution.imports import WRITERS, not_held
    from bylaw.constitution.load import load_constitution

    constitution = load_constitution(config.constitution)
    notes = [f"{constitution.name} as {config.format}", *not_held(constitution, config.format)]
    _put(WRITERS[config.format](constitution), config.out, notes)


def export_run(config: ExportConfig) -> None:
    """Write the rows of a run, so far as its stage has come. FileNotFoundError naming the one that has to run first."""
    from bylaw.layout import MANIFEST
    from bylaw.model.records import encode_record, read_records

    if not config.run.is_dir():
        raise FileNotFoundError(f"{config.run}: no such folder")
    of_labels = config.format in ("trl-preference", "trl-conversational", "trl-unpaired")
    path = config.run / ("label/preferences.jsonl" if of_labels else "revise/chains.jsonl")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `bylaw {path.parent.name}` writes it")
    records, stage = read_records(path), path.parent
    so_far = f"the stage {stage.name} has not finished here: these are the first {len(records)} of its records"
    notes = [] if (stage / MANIFEST).exists() else [so_far]
    if config.format == "anthropic-chains":
        text, told = _release_chains(config.run, records)
        _put(text, config.out, [*told, *notes])
        return
    rows = _makers()[config.format](records)
    text = b"".join(encode_record(row, str(config.out)) for row in rows.records).decode()
    _put(text, config.out, [rows.summary(), *notes])


def import_rows(config: ImportRowsConfig) -> None:
    """Write our records of the rows of a file."""
    from bylaw.model.records import decode_record, encode_record, written_lines
    from bylaw.rlaif.formats import read_preferences

    if not config.file.is_file():
        raise FileNotFoundError(f"{config.file}: no such file")
    if config.soft is not None and not 0.5 <= config.soft <= 1:
        raise ValueError(f"soft = {config.soft:g}; allowed: 0.5 to 1, how sure it is that the chosen answer is better")
    number, first = next(written_lines(config.file), (1, b"{}"))
    if "cst" in decode_record(first, f"{config.file}:{number}"):
        from bylaw.constitution.released_texts import read_chains

        if config.soft is not None:
            raise ValueError(
                f"--soft = {config.soft:g} says how sure preferences are, and {config.file} holds chains; leave it out"
            )
        records, imported = read_chains(config.file)
        count = len(imported.constitution.principles)
        notes = [f"{len(records)} chains by {count} principles, which `bylaw constitution import` reads from the file"]
    else:
        found = read_preferences(config.file, config.soft)
        records, notes = found.records, [found.summary()]
    _put(b"".join(encode_record(record, str(config.out)) for record in records).decode(), config.out, notes)


def _makers() -> dict[str, "Callable[[list[dict]], Counted]"]:
    from bylaw.rlaif import formats

    return {
        "trl-preference": lambda records: formats.preference_rows(records, text=True),
        "trl-conversational": formats.preference_rows,
        "trl-unpaired": formats.unpaired_rows,
        "trl-prompt-completion": formats.completion_rows,
        "revisions": formats.revision_rows,
    }


def _release_chains(run: Path, chains: list[dict]) -> tuple[str, list[str]]:
    """The chains with the requests of the constitution that the run kept, and what to tell of them. ValueError when
    they are by several, or have no critiques.
    """
    from bylaw.constitution.load import load_constitution
    from bylaw.constitution.released_texts import dump_chains

    hashes = sorted({chain["by"]["constitution"] for chain in chains})
    if len(hashes) != 1:
        raise ValueError(f"{run}: its chains are by {len(hashes)} constitutions; allowed: one")
    text, left_out = dump_chains(chains, load_constitution(run / "constitutions" / f"{hashes[0]}.toml"))
    kept = len(chains) - sum(left_out.values())
    return text, [f"{kept} chains", *(f"{count} left out: {reason}" for reason, count in left_out.items())]


def _put(text: str, out: Path | None, notes: list[str]) -> None:
    """Write the text, or print it with the notes on stderr. FileExistsError: nothing is overwritten."""
    import sys

    from bylaw.model.records import write_atomic

    if out is None:
        print(text, end="")
    else:
        if out.exists():
            raise FileExistsError(f"{out} exists; name another file, or remove it")
        write_atomic(out, text)
    for note in [*notes, *([f"written to {out}"] if out else [])]:
        print(note, file=sys.stderr if out is None else sys.stdout)
