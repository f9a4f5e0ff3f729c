"""What lies where in a run folder, beside the folders of the stages."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUMS = "SHA256SUMS"
RECIPE = "recipe.toml"
BEGUN, MANIFEST, STATE = "begun.json", "manifest.json", "state"
"""Of a stage: the terms that it began by, what it came to, and its training checkpoints until then."""
EVALUATION = "evaluation"
"""What `bylaw demo` measures."""
BEHAVIOUR, FOUND = "behaviour", "evaluation.json"
"""A folder for each set of prompts that `bylaw evaluate` was given, and the last file of each."""
DRAWN = "drawn"
"""Of an evaluation, the answers as they were drawn, which may be read anew."""
JUDGED, MEASURES = "judge", "measures.json"
"""A folder for each thing that `bylaw judge` was asked, and the last file of each."""
AMENDMENTS, AMENDMENT = "amendments", "amendment.json"
"""A folder for each constitution that `bylaw amend` was given, by its hash, and the last file of each."""


MIXED_IN = {stage: f"{stage}/helpful" for stage in ("reward", "dpo")}
"""By stage, the folder of the preferences for helpful answers that a file gave it to train on."""

OF_A_PART = ("chains", "pairs", "preferences", "flips", "answers")
"""Files of records that lie together in such a folder."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it keeps its recipe."""
    return (folder / RECIPE).is_file()


def folder_for(top: Path, file: str, about: Mapping[str, Any]) -> Path:
    """A folder in `top` that nothing else has: by the name of the file that was asked about, and a hash of `about`, all
    that decides what is found.
    """
    named = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    return top / f"{file.split('.')[0]}-{named}"


def parts(run: Path) -> list[str]:
    """What holds records that no stage made, as names in the run: folders of evaluations, judgements, amendments and
    preferences from elsewhere, and single files of answers without their ending.
    """
    tops = (EVALUATION, BEHAVIOUR, JUDGED, AMENDMENTS, *MIXED_IN.values())
    found = [path for top in tops for path in (run / top).rglob("*.jsonl")]
    named = [path.parent if path.stem in OF_A_PART else path.with_suffix("") for path in found]
    return sorted({path.relative_to(run).as_posix() for path in named})


def begun_beside(run: Path) -> list[str]:
    """Folders of evaluations, judgements and amendments that have begun and not finished, as names in the run."""
    ends = {f"{BEHAVIOUR}/*": FOUND, f"{JUDGED}/*": MEASURES, f"{AMENDMENTS}/*": AMENDMENT}
    found = [(place, end) for pattern, end in ends.items() for place in sorted(run.glob(pattern)) if place.is_dir()]
    return [place.relative_to(run).as_posix() for place, end in found if not (place / end).exists()]
