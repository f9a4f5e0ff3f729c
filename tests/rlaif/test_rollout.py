"""Episodes: what is drawn, how it is scored, and the columns against plain torch in float64."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bylaw.kernels.philox import request_id
from bylaw.model.data import Prompt
from bylaw.model.engine import Engine, Request
from bylaw.model.heads import ScalarModel, scalar_model
from bylaw.model.packing import pack
from bylaw.model.step import micro_batches
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.ppo_batch import Batch, Minibatch, fill_columns
from bylaw.rlaif.ppo_scores import Moments, Reward, check_rewards, score_rollouts, set_scores
from bylaw.rlaif.rollout import Rollout, sample_rollouts

SEED = 2
MakeModel = Callable[..., Transformer]
PROMPTS = [Prompt(f"p-{n}", [{"role": "user", "content": "w1 " * (n + 1)}]) for n in range(8)]


def episode(prompt: list[int], response: list[int], ended: bool = True) -> Rollout:
    return Rollout("p", prompt, response, [0.0] * len(response), ended)


def batch_of(rollouts: Sequence[Rollout], budget: int = 8192) -> tuple[Batch, list[Minibatch]]:
    """With one minibatch, of the last episode first."""
    order = list(reversed(range(len(rollouts))))
    plan = Minibatch(order, micro_batches([len(rollouts[i].ids) for i in order], budget))
    return Batch(rollouts, torch.device("cpu")), [plan]


def dense_logprobs(model: Transformer, ids: list[int], temperature: float) -> torch.Tensor:
    """Log-probs [S, V] of what follows each token, of one text alone, in float64."""
    with torch.no_grad():
        hidden = model(pack([ids])).double()
        return torch.log_softmax(hidden @ model.head_weight.double().T / temperature, dim=-1)


def taken(table: torch.Tensor, rollout: Rollout) -> torch.Tensor:
    start = len(rollout.prompt)
    return torch.stack([table[start + i - 1, id] for i, id in enumerate(rollout.response)])


@pytest.fixture
def rollouts(make_model: MakeModel, tokenizer: Tokenizer) -> list[Rollout]:
    config = PPOConfig(max_tokens=20, temperature=0.7, max_rows=3)
    engine = Engine(
        make_model(seed=1, spread=0.1), tokenizer, config.max_rows
    )  # near to uniform: some end soon, some do not
    return sample_rollouts(engine, PROMPTS, config, SEED, iteration=9)


def test_a_response_is_a_plain_draw_named_by_iteration_place_and_prompt(
    rollouts: list[Rollout], make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    """Plain: DeepSpeed-Chat sampled Llama greedily. Its ids end at the stop id, and nothing is padded to max_tokens."""
    engine = Engine(make_model(seed=1, spread=0.1), tokenizer)
    for place, (rollout, prompt) in enumerate(zip(rollouts, PROMPTS, strict=True)):
        request = Request(
            prompt=tokenizer.prompt_ids(prompt.messages),
            max_tokens=20,
            seed=SEED,
            request=request_id("rollout", 9, place, prompt.id),
            temperature=0.7,
            top_k=0,
            top_p=1.0,
            stop_ids=tokenizer.stop_ids,
        )
        [again] = engine.generate([request])
        assert (rollout.prompt_id, rollout.prompt, rollout.request) == (
            prompt.id,
            list(request.prompt),
            request.request,
        )
        assert (rollout.response, rollout.ended) == (again.ids, again.finish == "stop")
        assert rollout.ended == (rollout.response[-1] == tokenizer.eos_id)
        assert tokenizer.eos_id not in rollout.response[:-1]
        assert rollout.ids == rollout.prompt + rollout.response
    assert {rollout.ended for rollout in rollouts} == {True, False}


def test_the_same_prompt_twice_or_in_another_iteration_is_another_draw(
    make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    engine, config = Engine(make_model(), tokenizer), PPOConfig(max_tokens=8)
    both = [sample_rollouts(engine, PROMPTS[:1] * 2, config, SEED, iteration) for iteration in (0, 1)]
    assert len({tuple(rollout.response) for two in both for rollout in two}) == 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_log_prob_is_taken_at_the_sampling_temperature(
    make_model: MakeModel, tokenizer: Tokenizer, temperature: float
) -> None:
    """NeMo-Aligner, megatron_gpt_ppo_actor.py, and DeepSpeed-Chat: the temperature was left out."""
    policy, reference = make_model(seed=0), make_model(seed=1)
    config = PPOConfig(max_tokens=6, temperature=temperature)
    rollouts = sample_rollouts(Engine(policy, tokenizer), PROMPTS, config, SEED, 0)
    batch, plan = batch_of(rollouts, budget=30)
    fill_columns(batch, plan, policy, reference, scalar_model(policy, SEED), config)
    pieces = {name: column.split(batch.lengths) for name, column in batch.columns.items()}
    for i, rollout in enumerate(rollouts):
        own, other = (dense_logprobs(model, rollout.ids, temperature) for model in (policy, reference))
        spread = -(own.exp() * own).sum(-1)[len(rollout.prompt) - 1 : -1]
        expected = {"logprobs": taken(own, rollout), "reference": taken(other, rollout), "entropy": spread}
        for name, numbers in (expected | {"sampler": expected["logprobs"]}).items():
            torch.testing.assert_close(pieces[name][i].double(), numbers, atol=1e-5, rtol=0, msg=name)
    assert batch.tokens == len(batch.columns["values"]) == sum(len(r.response) for r in rollouts)


class Place(ScalarModel):
    """Scores each token by its place in its own text."""

    def forward(self, packed: Any) -> torch.Tensor:
        return packed.positions[packed.wanted].float()


def test_a_value_is_that_of_the_state_before_its_token(make_model: MakeModel) -> None:
    """The state in which a response token is chosen ends one token before it; the prompt's tokens have none. So the
    last value is that of the state before the end, not after it, which no reward follows.
    """
    batch, plan = batch_of([episode([5, 6, 7], [8, 9]), episode([5], [6, 7, 0])])
    run = batch.run([0, 1])
    assert run.before.wanted is not None
    assert (run.before.wanted + 1).tolist() == [3, 4, 6, 7, 8] and run.targets.tolist() == [8, 9, 6, 7, 0]
    assert batch.run([1, 0]).rows.tolist() == [2, 3, 4, 0, 1]
    policy = make_model()
    fill_columns(batch, plan, policy, policy, Place(policy), PPOConfig())
    assert batch.columns["values"].tolist() == [2, 3, 0, 1, 2]
    assert torch.equal(batch.columns["reference"], batch.columns["logprobs"])


def test_a_model_that_is_asked_for_some_states_gives_those_of_all(make_model: MakeModel) -> None:
    """Values and gradients are those of a pass over everything, of which the rest is thrown away."""
    model, rollouts = make_model(), [episode([5, 6, 7], [8, 9]), episode([5], [6, 7, 0])]
    batch, _ = batch_of(rollouts)
    run = batch.run([0, 1])
    picked = model(run.before)
    whole = model(pack([rollout.ids for rollout in rollouts]))[run.before.wanted]
    torch.testing.assert_close(picked, whole, atol=1e-6, rtol=0)
    seen = torch.randn(picked.shape, generator=torch.Generator().manual_seed(0))
    grads = [torch.autograd.grad((states * seen).sum(), list(model.parameters())) for states in (picked, whole)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_stream_is_packed_once(make_model: MakeModel) -> None:
    batch, plan = batch_of([episode([5, 6, 7], [8, 9]), episode([5], [6, 7, 0])])
    [[_, [micro_batch]]] = plan
    run = batch.run([1, 0])
    policy = make_model()
    fill_columns(batch, plan, policy, policy, scalar_model(policy, SEED), PPOConfig())
    assert micro_batch.items == [0, 1] and batch.run((1, 0)) is run and len(batch._runs) == 1
    assert run.before.layout is run.last.layout


def scored(
    rollouts: list[Rollout], models: Sequence[ScalarModel], budget: int = 8192, **settings: object
) -> list[float]:
    """Scores of reward models with mean 1 and deviation 2."""
    rewards = [Reward(model, 1.0, 2.0, 1 / len(models)) for model in models]
    batch, plan = batch_of(rollouts, budget)
    score_rollouts(rewards, batch, plan)
    set_scores(rewards, rollouts, PPOConfig(**settings), [Moments() for _ in models])  # pyright: ignore[reportArgumentType]
    return [rollout.score for rollout in rollouts]


@pytest.mark.parametrize("budget", [1, 6, 100])
def test_the_score_is_read_at_the_last_token_on_prompt_and_response(make_model: MakeModel, budget: int) -> None:
    rollouts = [episode([5, 6, 7], [8, 9]), episode([5], [6, 7, 8], ended=False), episode([5], [0])]
    found = scored(rollouts, [Place(make_model())], budget, missing_eos_penalty=0.25)
    assert found == [(4 - 1) / 2, (3 - 1) / 2 - 0.25, 0.0]
    assert [rollout.raw for rollout in rollouts] == [[4.0], [3.0], [1.0]]


def test_a_score_of_a_real_reward_model_is_that_of_the_text_alone(
    rollouts: list[Rollout], make_model: MakeModel
) -> None:
    """Of one with another temperature or another prompt it would not be."""
    reward = scalar_model(make_model(seed=3), SEED)
    found = scored(rollouts, [reward], 20, score_stats="none", missing_eos_penalty=0.0)
    with torch.no_grad():
        alone = [float(reward(pack([rollout.ids]))[-1]) for rollout in rollouts]
        without_prompt = [float(reward(pack([rollout.response]))[-1]) for rollout in rollouts]
    assert found == pytest.approx(alone, abs=1e-5)
    assert found != pytest.approx(without_prompt, abs=1e-2)


class Length(Place):
    """Likes short texts."""

    def forward(self, packed: Any) -> torch.Tensor:
        return -10 * super().forward(packed)


def test_reward_models_are_scaled_weighed_and_added(make_model: MakeModel) -> None:
    rollouts = [episode([5, 6, 7], [8, 9]), episode([5], [6, 7, 8], ended=False)]
    batch, plan = batch_of(rollouts)
    rewards = [Reward(Place(make_model()), 1.0, 2.0, 0.5), Reward(Length(make_model()), -20.0, 4.0, 2.0)]
    score_rollouts(rewards, batch, plan)
    set_scores(rewards, rollouts, PPOConfig(missing_eos_penalty=0.25), [])
    assert [rollout.raw for rollout in rollouts] == [[4, -40], [3, -30]]
    assert [rollout.score for rollout in rollouts] == [0.5 * 1.5 + 2 * -5, 0.5 * 1 + 2 * -2.5 - 0.25]


def test_scores_are_clipped_before_the_penalty_for_no_end(make_model: MakeModel) -> None:
    rollouts = [episode([5, 6, 7], [8, 9]), episode([5], [6, 7, 8], ended=False), episode([5], [0])]
    found = scored(rollouts, [Place(make_model())], score_clip=0.75, missing_eos_penalty=0.25)
    assert found == [0.75, 0.5, 0.0]
    assert scored([episode([5], [0])], [Length(make_model())], score_clip=0.75) == [-0.75]


def test_running_statistics_are_those_of_all_raw_scores_so_far() -> None:
    """Rows without an end count as what the model said of them (AReaL #1351: their penalty went into the mean)."""
    generator = torch.Generator().manual_seed(0)
    raw = (5 + 3 * torch.randn(24, dtype=torch.float64, generator=generator)).tolist()
    rewards, moments = [Reward(None)], [Moments()]  # type: ignore[arg-type]
    config = PPOConfig(score_stats="running", missing_eos_penalty=100.0)
    for end in (8, 16, 24):
        rollouts = [Rollout("p", [5], [6], [0.0], i % 2 == 0, raw=[raw[i]]) for i in range(end - 8, end)]
        set_scores(rewards, rollouts, config, moments)
        seen = torch.tensor(raw[:end])
        mean, std = float(seen.mean()), float(seen.std(correction=0))
        expected = [(score - mean) / std for score in raw[end - 8 : end]]
        assert [r.score + 100 * (not r.ended) for r in rollouts] == pytest.approx(expected)
    assert moments[0].count == 24


def test_running_statistics_of_equal_scores_divide_by_nothing() -> None:
    rollouts = [Rollout("p", [5], [6], [0.0], True, raw=[3.0]) for _ in range(4)]
    set_scores([Reward(None)], rollouts, PPOConfig(score_stats="running"), [Moments()])  # type: ignore[arg-type]
    assert [rollout.score for rollout in rollouts] == [0.0] * 4


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_a_deviation_that_cannot_be_divided_by_is_refused(make_model: MakeModel, std: float) -> None:
    """A reward model that says one number to everything has the deviation 0."""
    rewards = [Reward(scalar_model(make_model(), SEED), 0.0, std)]
    with pytest.raises(ValueError, match=r"score_std = .*allowed: a finite number above 0"):
        check_rewards(rewards, PPOConfig())
    check_rewards(rewards, PPOConfig(score_stats="none"))
    with pytest.raises(ValueError, match="no reward model"):
        check_rewards([], PPOConfig())
