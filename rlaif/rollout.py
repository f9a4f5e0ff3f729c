"""Episodes for PPO: prompts, the policy's responses to them, and what reward models say of those."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bylaw.kernels.philox import permutation, request_id
from bylaw.model.data import Prompt
from bylaw.model.engine import Engine, Request
from bylaw.model.parallel import ALONE, Parallel, deal
from bylaw.model.sampler import tokenizer_of
from bylaw.rlaif.config import PPOConfig


@dataclass
class Rollout:
    """One episode, as token ids. `request` names its draws, and `raw` has the score of each reward model as it came;
    None is of an answer that the judge could not rate. `rating` is what a judge said, where one gives the reward.
    """

    prompt_id: str
    prompt: list[int]
    response: list[int]
    sampler_logprobs: list[float]
    ended: bool
    request: int = 0
    raw: list[float | None] = field(default_factory=list)
    score: float = 0.0
    rating: dict[str, Any] | None = None

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.response


def draw_prompts(prompts: Sequence[Prompt], count: int, seed: int, iteration: int) -> list[Prompt]:
    """The iteration's prompts, from an endless series of shuffled passes over all of them."""
    places = range(iteration * count, (iteration + 1) * count)
    orders = {epoch: permutation(seed, len(prompts), epoch) for epoch in {place // len(prompts) for place in places}}
    return [prompts[int(orders[place // len(prompts)][place % len(prompts)])] for place in places]


def rollout_request(iteration: int, place: int, prompt: Prompt) -> int:
    """What names the draws of a response: iteration, place in it and prompt."""
    return request_id("rollout", iteration, place, prompt.id)


def sample_rollouts(
    engine: Engine, prompts: Sequence[Prompt], config: PPOConfig, seed: int, iteration: int, parallel: Parallel = ALONE
) -> list[Rollout]:
    """One response to each prompt, plain sampling at the run's temperature.

    Each data rank draws for its share of the prompts; every rank gets all responses.
    """
    tokenizer = tokenizer_of(engine)
    requests = [
        Request(
            prompt=tokenizer.prompt_ids(prompt.messages),
            max_tokens=config.max_tokens,
            seed=seed,
            request=rollout_request(iteration, place, prompt),
            temperature=config.temperature,
            stop_ids=tokenizer.stop_ids,
        )
        for place, prompt in enumerate(prompts)
    ]
    mine = deal([len(request.prompt) for request in requests], parallel.data_ranks)[parallel.data_rank]
    engine.forget()  # where the weights have not moved: in the critic's warm-up
    done = engine.generate([requests[i] for i in mine])
    answers = [(i, one.ids, one.logprobs, one.finish == "stop") for i, one in zip(mine, done, strict=True)]
    return [
        Rollout(prompts[i].id, list(requests[i].prompt), ids, logprobs, ended, requests[i].request)
        for i, ids, logprobs, ended in sorted(answer for part in parallel.gather(answers) for answer in part)
    ]
