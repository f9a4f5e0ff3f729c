"""`bylaw trace`: from a record of a run back to the principle's text and the prompt's file, and on to what it trained.

An ID is a prompt's id, for everything of it, or
    PROMPT@ROUND   a round of its chain          PROMPT#N   a pair and its label
    PROMPT+N       a helpful sample              ppo/ITERATION/PLACE   an episode
Prompt ids may look like any of these: `prompt:`, `round:`, `pair:` or `helpful:` in front says what is meant, and the
last @, # or + in it is then the one that counts.

Records that no stage made, those of evaluations, judgements and amendments, and preferences that a file gave, have the
name of their place in the run in front: evaluation/PROMPT#N, amendments/HASH/PROMPT#N, judge/NAME/ID,
behaviour/NAME/MODEL/PROMPT+N, reward/helpful/ID.
"""

import difflib
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

from bylaw.layout import DRAWN, MIXED_IN, parts
from bylaw.learned import mixed_in, preferred, supervised
from bylaw.ledger import Ledger
from bylaw.model.records import Record
from bylaw.words import many

KINDS = {"prompt": "", "round": "@", "pair": "#", "helpful": "+"}
_EPISODE = re.compile(r"ppo/([0-9]+)/([0-9]+)")
_NUMBER = re.compile(r"[0-9]+")


class Name(NamedTuple):
    """What an ID means: `kind` is one of KINDS or "episode"; an episode has no prompt yet, its iteration and place."""

    kind: str
    prompt: str
    number: int = 0
    iteration: int = 0

    def spelled(self) -> str:
        """The ID in full."""
        if self.kind == "episode":
            return f"ppo/{self.iteration}/{self.number}"
        mark = KINDS[self.kind]
        return f"{self.kind}:{self.prompt}" + (f"{mark}{self.number}" if mark else "")


class Tracer:
    """Traces IDs of one run; what training learned is worked out once."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    @cached_property
    def learned(self) -> dict[Any, Any]:
        return supervised(self.ledger)

    @cached_property
    def judged(self) -> dict[str, dict[str, Any]]:
        """By stage, what became of each preference; nothing is trained on those of a part, but for what a file gave."""
        if self.ledger.part:
            given = [stage for stage, part in MIXED_IN.items() if part == self.ledger.part]
            return {stage: mixed_in(self.ledger, stage) for stage in given}
        return {stage: preferred(self.ledger, stage) for stage in MIXED_IN}

    @cached_property
    def _of_parts(self) -> dict[str, "Tracer"]:
        """Of a run, those of its parts. What a part holds is read when it is asked for."""
        names = [] if self.ledger.part else parts(self.ledger.run)
        return {name: Tracer(Ledger(self.ledger.run, name)) for name in names}

    def trace(self, id: str) -> dict[str, Any]:
        """What is known of an ID, in JSON values; a section is there where it has something.

        Raises ValueError, with the nearest ids, for one that no record has, and for one that means several records.
        """
        part = "" if self.ledger.part else self._part(id)
        if part:
            found = self._of_parts[part].trace(id.removeprefix(f"{part}/"))
            return found | {"id": f"{part}/{found['id']}", "part": part}
        if self.ledger.part and id in self.ledger.preferences:  # which a file may have given any id
            one = self.ledger.preferences[id]
            return {"id": id, "kind": "pair", "prompt": self._prompt(one["prompt_id"]), "pairs": [self._pair(one)]}
        name = self.read(id)
        prompt = (
            self.ledger.rollouts[name.iteration, name.number]["prompt_id"] if name.kind == "episode" else name.prompt
        )
        found: dict[str, Any] = {"id": name.spelled(), "kind": name.kind, "prompt": self._prompt(prompt)}
        wanted = _SECTIONS[name.kind]
        if "chain" in wanted and prompt in self.ledger.chains:
            found["chain"] = self._chain(prompt, name.number if name.kind == "round" else None)
        number = name.number if name.kind in ("pair", "helpful") else None
        if "helpful" in wanted:
            found["helpful"] = [self._helpful(*key) for key in self.ledger.helpful if _same(key, prompt, number)]
        if prompt in self.ledger.questions:
            found["question"] = self.ledger.questions[prompt]
        if "pairs" in wanted:
            found["pairs"] = [self._pair(one) for one in self._pairs_of(prompt, number)]
        if "episodes" in wanted:
            one = (name.iteration, name.number) if name.kind == "episode" else None
            found["episodes"] = [
                self._episode(record)
                for place, record in self.ledger.rollouts.items()
                if record["prompt_id"] == prompt and one in (None, place)
            ]
        return {key: value for key, value in found.items() if value}

    def _part(self, id: str) -> str:
        """The part of the run that an ID begins with, if it goes on behind it."""
        found = [part for part in self._of_parts if id.startswith(f"{part}/")]
        return max(found, key=len, default="")

    def read(self, id: str) -> Name:
        """The one record, or prompt, that an ID means. Raises ValueError for none and for several."""
        there = [name for name in _readings(id) if self._exists(name)]
        if len(there) == 1:
            return there[0]
        if there:
            raise ValueError(
                f"{id!r} has several meanings here; say which: {', '.join(repr(n.spelled()) for n in there)}"
            )
        place = self.ledger.run / self.ledger.part
        raise ValueError(f"{id!r}: no record of {place} has this id{self._near(id)}{self._beside(id)}")

    def _beside(self, id: str) -> str:
        """The parts that an ID may be meant for: those with a place in the run that its beginning is like."""
        top = id.split("/")[0]
        meant = [part for part in self._of_parts if part.split("/")[0] == top and f"/{DRAWN}/" not in part]
        return f". In front of an ID there may stand: {', '.join(meant)}" if meant and "/" in id else ""

    def _exists(self, name: Name) -> bool:
        ledger = self.ledger
        if name.kind == "round":
            chain = ledger.chains.get(name.prompt, {"rounds": []})
            return name.number in [step["round"] for step in chain["rounds"]]
        if name.kind == "pair":
            return bool(self._pairs_of(name.prompt, name.number))
        if name.kind == "helpful":
            return (name.prompt, name.number) in ledger.helpful
        if name.kind == "episode":
            return (name.iteration, name.number) in ledger.rollouts
        return name.prompt in ledger.prompts

    def _near(self, id: str) -> str:
        ledger = self.ledger
        if id.startswith("ppo/") and ledger.rollouts:
            iteration, place = max(ledger.rollouts)
            return f"; episodes are ppo/0/0 to ppo/{iteration}/{place}"
        rounds = [f"{chain['id']}@{step['round']}" for chain in ledger.chains.values() for step in chain["rounds"]]
        known = [*ledger.prompts, *rounds, *(f"{prompt}+{n}" for prompt, n in ledger.helpful)]
        known += [*ledger.pairs, *ledger.preferences, *self._given()]
        kind, colon, rest = id.partition(":")
        asked = rest if colon and kind in KINDS else id
        begun = [one for one in known if one.rpartition("/")[2].startswith(asked)]
        near = list(dict.fromkeys([*begun[:3], *difflib.get_close_matches(asked, known, 3)]))[:3] or known[:3]
        of = len(ledger.prompts)
        return f"; it has {many(of, 'prompt')}; near it: {', '.join(map(repr, near))}"

    def _given(self) -> list[str]:
        """Of a run, the preferences that a file gave, as they are asked for."""
        there = [part for part in MIXED_IN.values() if part in self._of_parts]
        return [f"{part}/{id}" for part in there for id in self._of_parts[part].ledger.preferences]

    def _prompt(self, id: str) -> dict[str, Any]:
        told: dict[str, Any] = {"id": id, "messages": self.ledger.prompts.get(id, [])}
        if self.ledger.part:
            return told
        sources = self.ledger.sources
        places = [one for one in sources if id in one["lines"]]
        if places:
            first = places[0]
            note = {"note": first["note"]} if first["note"] else {}
            return told | {"file": first["file"], "line": first["lines"][id]} | note
        notes = [f"{one['file']}: {one['note'] or 'it has no such prompt'}" for one in sources]
        return told | {"note": "; ".join(notes)}

    def _chain(self, id: str, last: int | None) -> dict[str, Any]:
        chain = self.ledger.chains[id]
        rounds = [step for step in chain["rounds"] if last is None or step["round"] <= last]
        told = {key: chain[key] for key in ("by", "answer", "shots") if key in chain}
        return told | {"rounds": [self._round(chain, step) for step in rounds]}

    def _round(self, chain: Record, step: Record) -> dict[str, Any]:
        principle = self.ledger.principle(step["principle"], chain["by"]["constitution"])
        fate = self._fate(("round", chain["id"], step["round"]))
        return {"id": f"{chain['id']}@{step['round']}"} | step | {"principle": principle} | fate

    def _helpful(self, id: str, number: int) -> dict[str, Any]:
        sample = self.ledger.helpful[id, number]
        kept = {key: sample[key] for key in ("given", "answer", "by", "reading") if key in sample}
        return {"id": f"{id}+{number}"} | kept | self._fate(("helpful", id, number))

    def _fate(self, key: Any) -> dict[str, Any]:
        """What supervised training made of a text, as "finetune"; nothing is trained on a part's texts."""
        if self.ledger.part:
            return {}
        manifest = self.ledger.manifests.get("finetune")
        if manifest is None:
            return {"finetune": {"unfinished": True}}
        return {"finetune": self.learned[key] | {"model": manifest["outputs"]["sl-cai"]}}

    def _pairs_of(self, prompt: str, number: int | None) -> list[Record]:
        """The pairs of a prompt, labelled where they are."""
        merged = self.ledger.pairs | self.ledger.preferences
        known = [one for one in merged.values() if one["prompt_id"] == prompt]
        return [one for one in known if number is None or one["id"] == f"{prompt}#{number}"]

    def _pair(self, one: Record) -> dict[str, Any]:
        told = {key: one[key] for key in ("id", "a", "b")} | {"pairs_by": one["by"].get("pairs_by", one["by"])}
        if one["id"] not in self.ledger.preferences:
            return told | {"label": None}
        by = {key: value for key, value in one["by"].items() if key != "pairs_by"}
        kept = {key: one[key] for key in ("p_a", "unclamped", "abstained", "shots") if key in one}
        told["label"] = kept | {"by": by, "readings": [self._reading(reading, by) for reading in one["labels"]]}
        return told | self._uses(one)

    def _uses(self, one: Record) -> dict[str, Any]:
        """What reward model and DPO made of a preference."""
        told: dict[str, Any] = {}
        for stage, output in (("reward", "reward-model"), ("dpo", "dpo-cai")):
            if stage in self.ledger.manifests and stage in self.judged:
                model = self.ledger.manifests[stage]["outputs"][output]
                told[stage] = self.judged[stage][one["id"]] | {"model": model}
                if self.ledger.manifests[stage]["config"].get("hard_labels"):
                    told[stage]["hard_labels"] = True
        return told

    def _reading(self, reading: Record, by: Mapping[str, Any]) -> dict[str, Any]:
        if "principle" not in reading or "constitution" not in by:
            return reading
        return reading | {"principle": self.ledger.principle(reading["principle"], by["constitution"])}

    def _episode(self, one: Record) -> dict[str, Any]:
        kept = ("iteration", "place", "prompt_id", "seed", "request", "ended", "raw", "score", "weights")
        text = self.ledger.tokenizer.decode(one["ids"]).strip()
        told: dict[str, Any] = {"id": f"ppo/{one['iteration']}/{one['place']}", "text": text}
        told |= {key: one[key] for key in kept}
        if "rating" in one:
            by = {"constitution": self.ledger.rated_by}
            told["rating"] = one["rating"] | {"readings": [self._reading(r, by) for r in one["rating"]["readings"]]}
        manifest = self.ledger.manifests.get("ppo")
        if manifest is None:
            return told | {"unfinished": True}
        inputs, config = manifest["inputs"], manifest["config"]
        scorers = [inputs[name] for name in inputs if name == "reward-model" or name.startswith("reward ")]
        told |= {"judge": inputs["judge"]} if "judge" in inputs else {}  # it gave marks, in place of a reward model
        told["reward_models"] = scorers
        told["start"] = inputs["sl-cai"]
        told["sampling"] = {"temperature": config["temperature"], "max_tokens": config["max_tokens"]}
        if one["iteration"] >= manifest["counts"]["iterations"]:  # it was stopped before this iteration was learned
            told["learned_by"] = []
        else:
            told["learned_by"] = ["value"] if one["iteration"] < config["critic_warmup"] else ["policy", "value"]
        return told | {"model": manifest["outputs"]["rl-cai"]}


_SECTIONS = {
    "prompt": ("chain", "helpful", "pairs", "episodes"),
    "round": ("chain",),
    "helpful": ("helpful",),
    "pair": ("pairs", "episodes"),
    "episode": ("episodes", "pairs"),
}


def _readings(id: str) -> list[Name]:
    """What an ID may mean by its form."""
    kind, colon, rest = id.partition(":")
    if colon and kind in KINDS:
        return _as_kind(kind, rest)
    episode = _EPISODE.fullmatch(id)
    if episode:
        return [Name("episode", "", int(episode[2]), int(episode[1]))]
    return [name for kind in KINDS for name in _as_kind(kind, id)]


def _as_kind(kind: str, text: str) -> list[Name]:
    if not KINDS[kind]:
        return [Name(kind, text)]
    prompt, mark, number = text.rpartition(KINDS[kind])
    plain = _NUMBER.fullmatch(number) and str(int(number)) == number
    return [Name(kind, prompt, int(number))] if mark and plain else []


def _same(key: tuple[str, int], prompt: str, number: int | None) -> bool:
    return key[0] == prompt and number in (None, key[1])
