"""Episodes for PPO: responses of the policy, their scores, and the per-token columns that PPO needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bylaw.kernels.linear_logprob import LogProbs, linear_logprob
from bylaw.kernels.philox import request_id
from bylaw.model.data import Prompt
from bylaw.model.engine import Engine, Request
from bylaw.model.heads import ScalarModel
from bylaw.model.packing import Packed, pack, token_batches
from bylaw.model.sampler import tokenizer_of
from bylaw.model.settings import require
from bylaw.model.supervised import token_states
from bylaw.model.transformer import Transformer
from bylaw.rlaif.config import PPOConfig


@dataclass
class Rollout:
    """One episode. The tensors are columns [R] over its response tokens."""

    prompt_id: str
    prompt: list[int]
    response: list[int]
    sampler_logprobs: Tensor
    ended: bool
    score: float = 0.0
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.response


@dataclass(frozen=True)
class ScoreScale:
    """How a reward model's raw score becomes an episode's score: (raw - mean) / std, less a penalty for no end.

    Raises ValueError for a deviation that nothing can be divided by: that of a reward model with one score for all.
    """

    mean: float
    std: float
    missing_eos_penalty: float

    def __post_init__(self) -> None:
        require(0 < self.std < math.inf, "score_std", self.std, "a finite number above 0 (or normalize_scores = false)")

    def __call__(self, raw: float, ended: bool) -> float:
        return (raw - self.mean) / self.std - (0.0 if ended else self.missing_eos_penalty)


def sample_rollouts(
    engine: Engine, prompts: Sequence[Prompt], config: PPOConfig, seed: int, iteration: int
) -> list[Rollout]:
    """One response to each prompt, plain sampling at the run's temperature; draws are named by iteration and place."""
    tokenizer = tokenizer_of(engine)
    requests = [
        Request(
            prompt=tokenizer.prompt_ids(prompt.messages),
            max_tokens=config.max_tokens,
            seed=seed,
            request=request_id("rollout", iteration, place, prompt.id),
            temperature=config.temperature,
            stop_ids=tokenizer.stop_ids,
        )
        for place, prompt in enumerate(prompts)
    ]
    engine.forget()  # where the weights have not moved: in the critic's warm-up
    completions = engine.generate(requests)
    return [
        Rollout(prompt.id, list(request.prompt), done.ids, torch.tensor(done.logprobs), done.finish == "stop")
        for prompt, request, done in zip(prompts, requests, completions, strict=True)
    ]


@torch.no_grad()
def score_rollouts(model: ScalarModel, rollouts: Sequence[Rollout], scale: ScoreScale, budget: int) -> None:
    """Set each rollout's score: the reward model at the response's last token, on prompt and response."""
    for run in token_batches([len(rollout.ids) for rollout in rollouts], budget):
        packed = pack([rollouts[i].ids for i in run], model.trunk.device)
        for i, raw in zip(run, model(packed)[packed.last].tolist(), strict=True):
            rollouts[i].score = scale(raw, rollouts[i].ended)


def pack_rollouts(rollouts: Sequence[Rollout], device: torch.device) -> tuple[Packed, Tensor]:
    """The episodes as one packed stream of T tokens, and the places [n] of the response tokens in it."""
    packed = pack([rollout.ids for rollout in rollouts], device)
    flags = [flag for r in rollouts for flag in [False] * len(r.prompt) + [True] * len(r.response)]
    return packed, torch.tensor(flags).nonzero().squeeze(-1).to(device)


def response_values(model: ScalarModel, packed: Packed, places: Tensor) -> Tensor:
    """The value [n] of the state that each token at `places` was chosen in: the scalar head one token before it."""
    return model(packed)[places - 1]


def response_logprobs(model: Transformer, packed: Packed, places: Tensor, temperature: float) -> LogProbs:
    """Log-probs, entropies and log-normalisers [n] at `places`. No gradient."""
    hidden, tokens = token_states(model, packed, places)
    return linear_logprob(hidden, model.head_weight, tokens, temperature)


@torch.no_grad()
def fill_columns(
    rollouts: Sequence[Rollout], policy: Transformer, reference: Transformer, value: ScalarModel, temperature: float
) -> None:
    """Set the columns logprobs, reference, values and entropy of one micro-batch.

    Called with the micro-batches of the first update, so that its first ratio is exactly 1.
    """
    packed, places = pack_rollouts(rollouts, policy.device)
    now = response_logprobs(policy, packed, places, temperature)
    columns = {
        "logprobs": now.logprobs,
        "reference": response_logprobs(reference, packed, places, temperature).logprobs,
        "values": response_values(value, packed, places),
        "entropy": now.entropy,
    }
    lengths = [len(rollout.response) for rollout in rollouts]
    for name, column in columns.items():
        for rollout, piece in zip(rollouts, column.split(lengths), strict=True):
            rollout.columns[name] = piece


def column(rollouts: Sequence[Rollout], name: str) -> Tensor:
    """A column [n] over the response tokens of all `rollouts`."""
    return torch.cat([rollout.columns[name] for rollout in rollouts])
