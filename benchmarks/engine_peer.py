"""Transformers behind the engine's interface: its batched ways to generate and to score; the fastest is the peer.

Prompts are padded on the left, as a decoder wants them. A batch decodes until its longest request is done, and each
request keeps its own count. It needs Transformers, which bylaw otherwise does not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bylaw.benchmarks.engine_workloads import Chain, Work
from bylaw.model.engine import Completion, Query, Request

PAD = 0


@dataclass(frozen=True)
class Way:
    """One way to use Transformers."""

    cache: str = "dynamic"
    batch: int = 64
    """Rows of a padded batch."""
    sort: bool = False
    """Prompts of a like length together; how long the answers will be, nobody knows."""
    by_hand: bool = False
    """A person computes the common prefix once, repeats its cache over the batch, and goes on from there."""

    def __str__(self) -> str:
        notes = ("sorted by prompt length",) * self.sort + ("prefix reused by hand",) * self.by_hand
        return ", ".join((f"{self.cache} cache, batches of {self.batch}", *notes))


def ways(name: str, work: Work) -> list[Way]:
    """The ways that may be the fastest for a workload."""
    by_hand = name.endswith("by hand")
    if by_hand:
        return [Way(by_hand=True)]
    if work.queries:
        return [Way("no", batch) for batch in (8, 32)]
    lengths = {len(request.prompt) for request in work.requests}
    return [Way("dynamic"), Way("static"), *([Way("dynamic", sort=True)] if len(lengths) > 1 else [])]


def library() -> Any:
    """Transformers. Raises ValueError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"the peer is not installed ({error}): pip install transformers, or --peer none") from error
    return transformers


def load(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """The checkpoint as a Transformers model that decodes greedily and never stops by itself."""
    transformers = library()
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    # A checkpoint brings settings of its own, such as a repetition penalty or where to stop.
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=PAD)
    model.to(device)
    return model.eval()


@dataclass(frozen=True)
class Peer:
    """A Transformers model used in one way."""

    model: Any
    way: Way
    shared: int = 0
    """The common prefix that is reused by hand."""

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Continue each prompt by its own number of tokens, in padded batches."""
        ids: dict[int, list[int]] = {}
        for rows in self._batches([request.prompt for request in requests]):
            prompts = [requests[row].prompt for row in rows]
            longest = max(requests[row].max_tokens for row in rows)
            made = self._continue(prompts, longest).tolist()
            ids |= {row: new[: requests[row].max_tokens] for row, new in zip(rows, made, strict=True)}
        return [Completion(ids=ids[row], logprobs=[], finish="length") for row in range(len(requests))]

    @torch.no_grad()
    def score(self, queries: Sequence[Query]) -> list[list[float]]:
        """Log-probs of one-token candidates at the end of each prompt."""
        found: dict[int, list[float]] = {}
        for rows in self._batches([prompt for prompt, _ in queries]):
            logprobs = self._last_logits([queries[row][0] for row in rows]).float().log_softmax(-1)  # [n, V]
            asked = torch.tensor([[token for (token,) in queries[row][1]] for row in rows], device=self.model.device)
            found |= dict(zip(rows, logprobs.gather(1, asked).tolist(), strict=True))
        return [found[row] for row in range(len(queries))]

    def chain(self, scripts: Sequence[Chain]) -> list[Any]:
        """All chains in step: each turn is one batched generation over all of them."""
        results: dict[int, Any] = {}
        asked = {index: next(script) for index, script in enumerate(scripts)}
        while asked:
            requests = [request for request in asked.values() if isinstance(request, Request)]
            done = dict(zip(asked, self.generate(requests), strict=True))
            asked = {}
            for index, completion in done.items():
                try:
                    asked[index] = scripts[index].send(completion)
                except StopIteration as end:
                    results[index] = end.value
        return [results[index] for index in range(len(scripts))]

    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [V] after one text, alone and unpadded."""
        with torch.no_grad():
            return self._last_logits([ids])[0].float()

    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Which prompts go together. By hand, those of one prefix."""
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) if self.way.sort else 0)
        known = self.shared if self.way.by_hand else 0
        for _, group in groupby(order, key=lambda row: list(prompts[row][:known])):
            rows = list(group)
            yield from (rows[start : start + self.way.batch] for start in range(0, len(rows), self.way.batch))

    def _continue(self, prompts: Sequence[Sequence[int]], new: int) -> Tensor:
        """New tokens [n, new]."""
        options: dict[str, Any] = {}
        if self.way.by_hand:
            options = {"past_key_values": self._prefix_cache(prompts)}
        elif self.way.cache == "static":
            options = {"cache_implementation": "static"}
        ids, mask = self._padded(prompts)
        made = self.model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)
        return made[:, ids.shape[1] :]

    def _last_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [n, V] after each prompt."""
        ids, mask = self._padded(prompts)
        start, options = 0, {}
        if self.way.by_hand:
            start, options = self.shared, {"past_key_values": self._prefix_cache(prompts)}
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        return self.model(
            input_ids=ids[:, start:],
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=1,
            use_cache=self.way.by_hand,
            **options,
        ).logits[:, -1]

    def _prefix_cache(self, prompts: Sequence[Sequence[int]]) -> Any:
        """The keys and values of the common prefix, computed once and repeated for each prompt."""
        prefix = torch.tensor([prompts[0][: self.shared]], device=self.model.device)
        cache = self.model(input_ids=prefix, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(prompts))
        return cache

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask [n, S]; padding stands between the prefix reused by hand, if any, and what is a prompt's own."""
        keep, width = self.shared if self.way.by_hand else 0, max(map(len, prompts))
        ids = torch.full((len(prompts), width), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            own = width - (len(prompt) - keep)
            ids[row, :keep], ids[row, own:] = torch.tensor(prompt[:keep]), torch.tensor(prompt[keep:])
            mask[row, :keep], mask[row, own:] = 1, 1
        return ids.to(self.model.device), mask.to(self.model.device)
