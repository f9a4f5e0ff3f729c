"""The sampling engine: generation, scores, and chains of turns, over the trainer's own parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

import torch
from tqdm import tqdm

from bylaw.model.engine.decode import Decoder, make_decoder, make_store
from bylaw.model.engine.jobs import Job
from bylaw.model.engine.prefix import PAGE, PrefixIndex
from bylaw.model.engine.request import Completion, Limits, Query, Request, Result, Script
from bylaw.model.engine.run import Listener, Run
from bylaw.model.engine.stats import Stats
from bylaw.model.engine.store import Store, budget
from bylaw.model.engine.weights import sampling_phase, weight_version
from bylaw.model.settings import require
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer

# Tokens of a stream: on a CPU, few enough that what lies between two products stays in its cache.
CPU_TOKENS, GPU_TOKENS = 1024, 8192
OnError = Literal["raise", "return"]


class Engine:
    """Generates and scores with `model` as it is at the call: there is no copy of its weights.

    Keys and values of shared prefixes are kept between calls, for as long as the weights stay what they are. `stats`
    counts what was done. One call at a time: one from a script, a listener or another thread, in the middle of another,
    raises RuntimeError.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        max_rows: int = 64,
        *,
        cache_gib: float | None = None,
        prefill_tokens: int | None = None,
        graphs: bool = True,
    ) -> None:
        """`max_rows` requests run together; all keys and values take at most `cache_gib` GiB (None: 2 on a CPU, half of
        what is free on a GPU); prompts and scores run as streams of `prefill_tokens` tokens, a longer text alone (None:
        1,024 on a CPU, 8,192 on a GPU).

        On a GPU, steps of decoding are captured as CUDA graphs, unless `graphs` is False or the parameters are shards.
        Without a `tokenizer` there are no stop strings. Raises ValueError for a setting out of range.
        """
        require(max_rows >= 1, "max_rows", max_rows, "1 or more")
        if prefill_tokens is None:
            prefill_tokens = CPU_TOKENS if model.device.type == "cpu" else GPU_TOKENS
        require(prefill_tokens >= 1, "prefill_tokens", prefill_tokens, "1 or more")
        if cache_gib is not None:
            budget(model, cache_gib)
        self.model, self.tokenizer, self.max_rows, self.cache_gib = model, tokenizer, max_rows, cache_gib
        self.prefill_tokens, self.graphs = prefill_tokens, graphs
        self.late = int(model.device.type == "cuda")  # steps that are under way before the first of them is read
        self.stats = Stats()
        self.run: Run | None = None  # the call that is under way
        self._memory: Memory | None = None
        self._free = Lock()

    def release(self) -> None:
        """Give all keys and values back; the next call takes memory anew."""
        self._memory = None

    @property
    def memory(self) -> "Memory":
        """Keys and values, taken when they are first asked for."""
        if self._memory is None:
            self._memory = Memory.take(self.model, self.max_rows, self.cache_gib, self.graphs)
        return self._memory

    def generate(
        self,
        requests: Sequence[Request],
        *,
        progress: str | None = None,
        on_token: Listener | None = None,
        on_error: OnError = "raise",
    ) -> list[Completion]:
        """Continue each prompt; completions in the caller's order. `progress` labels a bar.

        `on_token` hears (index of the request, its ids so far) after each token. Raises one ValueError, before any
        work, that names each request that cannot be done: an empty prompt, one that leaves no room in the context or
        the cache, ids outside the vocabulary, a sampling setting out of range, an empty stop string. With `on_error`
        "return" such a request has its ValueError in its place, and the others are done. Logits that are NaN or
        infinite end it all with a ValueError.
        """
        return self._answers(requests, _named("request", on_error), progress, on_token)

    def score(
        self, queries: Sequence[Query | tuple[Any, Any]], *, progress: str | None = None, on_error: OnError = "raise"
    ) -> list[list[float]]:
        """For each (prompt, candidates), each candidate's log-prob after the prompt: summed, at temperature 1.

        Candidates that differ only in their last token share one pass, and so do equal queries; prompts with the same
        beginning share that. Errors as in `generate`.
        """
        asked = [Query(*query) for query in queries]
        return self._answers(asked, _named("query", on_error), progress, None)

    def chain(self, scripts: Sequence[Script[Result]], *, progress: str | None = None) -> list[Result]:
        """Run scripts together, each at its own pace; returns what they return, in order.

        A script is a generator. It yields a Request and is sent its Completion, or a Query and is sent its log-probs,
        as often as it likes:

            def answer_and_revise(prompt):
                answer = yield Request(prompt=prompt, ...)
                return (yield Request(prompt=[*prompt, *answer.ids, *CRITICISE], ...))

        What the next prompt has in common with the text before stays in the cache. What cannot be done is thrown into
        the script as ValueError; if that, or another ValueError of its own, ends it, the other scripts are finished
        first, and then it is raised (the first script's, if there are several). Any other error ends them all at once.
        """
        with self._phase():
            jobs = self._run(scripts, progress, None)
        for job in jobs:
            if job.error is not None:
                raise job.error
        return [job.result for job in jobs]

    def forget(self) -> None:
        """Drop the shared prefixes that are kept between calls.

        Sums over a cached beginning add up in another order: a call after this has the same bits whether what came
        before was done by this process or by one that was killed.
        """
        with self._alone():
            if self._memory is not None:
                self._memory.index.begin(b"")

    def check(self) -> None:
        """Raise AssertionError if memory or shared prefixes are not consistent. For tests; also while a call runs."""
        self.memory.index.check()
        rows = 0 if self.run is None else len(self.run.running)
        self.memory.store.check(rows, self.memory.index.segments())

    @contextmanager
    def _phase(self) -> Iterator[None]:
        """The weights whole, and as they are. Mistakes are told inside, so that ranks enter and leave together."""
        # Kernels are launched on the current device, whatever their tensors.
        on_device = torch.cuda.device_of(self.model.embed.weight)
        with self._alone(), on_device, torch.inference_mode(False), torch.no_grad(), sampling_phase(self.model):
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._free.acquire(blocking=False):
            raise RuntimeError(
                "this engine is in the middle of a call; a script yields what it asks, and another thread waits or has "
                "an engine of its own"
            )
        try:
            yield
        finally:
            self._free.release()

    def _answers(
        self, asked: Sequence[Request | Query], name: str | None, progress: str | None, on_token: Listener | None
    ) -> list[Any]:
        with self._phase():
            if name is not None:
                _check(self._limits(), asked, name)
            jobs = self._run([_once(one) for one in asked], progress, on_token)
        return [job.result if job.error is None else job.error for job in jobs]

    def _run(self, scripts: Sequence[Script[Any]], progress: str | None, on_token: Listener | None) -> list[Job]:
        jobs = [Job(i, script) for i, script in enumerate(scripts)]
        if not jobs:
            return jobs
        memory = self.memory
        memory.index.begin(weight_version(self.model))
        memory.decoder.begin(not any(hasattr(module, "unshard") for module in self.model.modules()))
        with tqdm(total=len(jobs), desc=progress, unit="text", disable=progress is None) as bar:
            self.run = Run(
                self.model, self.tokenizer, memory.store, memory.index, memory.decoder, self._limits(), self.stats,
                min(self.max_rows, len(jobs)), self.prefill_tokens, self.late, on_token, bar,
            )  # fmt: skip
            try:
                self.run.finish(jobs)
            except BaseException:
                self.release()  # what was under way is half done
                raise
            finally:
                self.run = None
        return jobs

    def _limits(self) -> Limits:
        return Limits.of(self.model.config, self.memory.store.pages * PAGE, self.tokenizer is not None)


@dataclass
class Memory:
    """Keys and values, what is found in them, and what steps rows on."""

    store: Store
    index: PrefixIndex
    decoder: Decoder

    @classmethod
    def take(cls, model: Transformer, rows: int, cache_gib: float | None, graphs: bool) -> "Memory":
        """Memory for `rows` rows."""
        store = make_store(model, budget(model, cache_gib), rows)
        return cls(store, PrefixIndex(store.discard), make_decoder(model, store, rows, graphs))


def _named(name: str, on_error: OnError) -> str | None:
    """What a mistake is told by before work starts; None: each in its place."""
    require(on_error in ("raise", "return"), "on_error", on_error, "raise, return")
    return name if on_error == "raise" else None


def _check(limits: Limits, asked: Sequence[Request | Query], name: str) -> None:
    """Raise one ValueError that names each of `asked` that cannot be done."""
    errors = []
    for i, one in enumerate(asked):
        try:
            limits.check(one)
        except ValueError as error:
            errors.append(f"{name} {i}: {error}")
    if errors:
        raise ValueError("; ".join(errors))


def _once(asked: Request | Query) -> Script[Any]:
    return (yield asked)
