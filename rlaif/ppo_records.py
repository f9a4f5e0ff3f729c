"""rollouts.jsonl: every episode as it was drawn and scored, from which a killed run goes on without drawing it again.

One line an episode: iteration, place, prompt_id, request, seed, ids, logprobs, ended, raw, score, weights, and
rating where a judge gives the reward (rlaif/direct.py).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from bylaw.model.data import Prompt
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.records import Record, RecordWriter, decode_record, numbered_lines, repair
from bylaw.model.tokenizer import Tokenizer
from bylaw.rlaif.rollout import Rollout, rollout_request


class RolloutFile:
    """The episodes of a run, `count` in an iteration. One rank reads and writes; all have what it read.

    JSON keeps floats exactly, so an iteration that is repeated from the file has the bits that it had.
    """

    def __init__(self, path: Path, first_iteration: int, count: int, seed: int, parallel: Parallel = ALONE) -> None:
        """The run goes on at `first_iteration`. Whole iterations from there on are kept, to be taken; what follows the
        first that is not whole, or out of order, is cut off the file.
        """
        self.count, self.seed, self.parallel = count, seed, parallel
        self._writer = RecordWriter(path)
        kept = parallel.tell(_trim(path, first_iteration, count) if parallel.first else [])
        self._kept = {first_iteration + n: kept[n * count : (n + 1) * count] for n in range(len(kept) // count)}

    def __enter__(self) -> "RolloutFile":
        if self.parallel.first:
            self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.parallel.first:
            self._writer.__exit__(kind, error, trace)

    def take(self, iteration: int, prompts: Sequence[Prompt], tokenizer: Tokenizer, weights: str) -> list[Rollout]:
        """The episodes that a killed run drew for `prompts` in this iteration; none if it drew none. It says so if the
        parameters that drew them are not to the bit those of now, which `weights` names.

        Raises ValueError where they are those of another run: of other prompts, or another seed.
        """
        records = self._kept.pop(iteration, [])
        for place, (record, prompt) in enumerate(zip(records, prompts, strict=False)):
            wanted = (prompt.id, rollout_request(iteration, place, prompt), self.seed)
            found = tuple(record[name] for name in ("prompt_id", "request", "seed"))
            if wanted != found:
                raise ValueError(
                    f"{self._writer.path}: iteration {iteration}, place {place} has (prompt, request, seed) {found}, "
                    f"and this run {wanted}; it is the file of another run: give another folder, or delete it"
                )
        if self.parallel.first and records and records[0]["weights"] != weights:
            print(
                f"ppo {iteration + 1}: rollouts are taken from {self._writer.path}, drawn by weights that differ from "
                "these in bits, as another number of ranks or another machine makes them",
                flush=True,
            )
        return [
            Rollout(
                record["prompt_id"],
                tokenizer.prompt_ids(prompt.messages),
                record["ids"],
                record["logprobs"],
                record["ended"],
                record["request"],
                record["raw"],
                rating=record.get("rating"),
            )
            for record, prompt in zip(records, prompts, strict=False)
        ]

    def add(self, iteration: int, rollouts: Sequence[Rollout], weights: str) -> None:
        """Write an iteration, whole. `weights` names the parameters that it was drawn from."""
        if self.parallel.first:
            places = enumerate(rollouts)
            self._writer.write(_record(iteration, place, rollout, self.seed, weights) for place, rollout in places)


def _record(iteration: int, place: int, rollout: Rollout, seed: int, weights: str) -> Record:
    rating = {} if rollout.rating is None else {"rating": rollout.rating}
    return {
        "iteration": iteration,
        "place": place,
        "prompt_id": rollout.prompt_id,
        "request": rollout.request,
        "seed": seed,
        "ids": rollout.response,
        "logprobs": rollout.sampler_logprobs,
        "ended": rollout.ended,
        "raw": rollout.raw,
        "score": rollout.score,
        "weights": weights,
    } | rating


def _trim(path: Path, first_iteration: int, count: int) -> list[Record]:
    """The records of whole iterations from `first_iteration` on; what follows them is cut off."""
    repair(path)
    kept: list[Record] = []
    end = whole_end = 0
    for number, line in numbered_lines(path) if path.exists() else ():
        record = decode_record(line, f"{path}:{number}")
        end += len(line)
        if record["iteration"] < first_iteration:
            whole_end = end
            continue
        if (record["iteration"], record["place"]) != (first_iteration + len(kept) // count, len(kept) % count):
            break
        kept.append(record)
        whole_end = end if len(kept) % count == 0 else whole_end
    if path.exists():
        os.truncate(path, whole_end)
    return kept[: len(kept) // count * count]
