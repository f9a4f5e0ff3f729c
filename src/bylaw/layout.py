"""What lies where in a run folder, beside the folders of the stages."""

from pathlib import Path

SUMS = "SHA256SUMS"
RECIPE = "recipe.toml"
BEGUN, MANIFEST, STATE = "begun.json", "manifest.json", "state"
"""Of a stage: the terms that it began by, what it came to, and its training checkpoints until then."""
EVALUATION = "evaluation"
"""What `bylaw demo` measures."""
BEHAVIOUR, FOUND = "behaviour", "evaluation.json"
"""What `bylaw evaluate` finds, and its last file."""
JUDGED, MEASURES = "judge", "measures.json"
"""A folder for each thing that `bylaw judge` was asked, and the last file of each."""
AMENDMENTS, AMENDMENT = "amendments", "amendment.json"
"""A folder for each constitution that `bylaw amend` was given, by its hash, and the last file of each."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it keeps its recipe."""
    return (folder / RECIPE).is_file()


def begun_beside(run: Path) -> list[str]:
    """Folders of evaluations, judgements and amendments that have begun and not finished, as names in the run."""
    ends = {BEHAVIOUR: FOUND, f"{JUDGED}/*": MEASURES, f"{AMENDMENTS}/*": AMENDMENT}
    found = [(place, end) for pattern, end in ends.items() for place in sorted(run.glob(pattern)) if place.is_dir()]
    return [place.relative_to(run).as_posix() for place, end in found if not (place / end).exists()]
