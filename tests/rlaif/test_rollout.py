"""Episodes: what is drawn, how it is scored, and the columns against plain torch in float64."""

import math
from collections.abc import Callable

import pytest
import torch

from bylaw.kernels.philox import request_id
from bylaw.model.data import Prompt
from bylaw.model.engine import Engine, Request
from bylaw.model.heads import ScalarModel, scalar_model
from bylaw.model.packing import Packed, pack
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer
from bylaw.rlaif.config import PPOConfig
from bylaw.rlaif.rollout import (
    Rollout,
    ScoreScale,
    column,
    fill_columns,
    pack_rollouts,
    response_values,
    sample_rollouts,
    score_rollouts,
)

SEED = 2
MakeModel = Callable[..., Transformer]
PROMPTS = [Prompt(f"p-{n}", [{"role": "user", "content": "w1 " * (n + 1)}]) for n in range(8)]


def episode(prompt: list[int], response: list[int], ended: bool = True) -> Rollout:
    return Rollout("p", prompt, response, torch.zeros(len(response)), ended)


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
    engine = Engine(make_model(seed=1, spread=0.1), tokenizer)
    for place, (rollout, prompt) in enumerate(zip(rollouts, PROMPTS, strict=True)):
        request = Request(
            prompt=tokenizer.prompt_ids(prompt.messages),
            max_tokens=20,
            seed=SEED,
            request=request_id("rollout", 9, place, prompt.id),
            temperature=0.7,
            stop_ids=tokenizer.stop_ids,
        )
        [again] = engine.generate([request])
        assert (rollout.prompt_id, rollout.prompt) == (prompt.id, list(request.prompt))
        assert (rollout.response, rollout.ended) == (again.ids, again.finish == "stop")
        assert rollout.ended == (rollout.response[-1] == tokenizer.eos_id)
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
    value = scalar_model(policy, SEED)
    fill_columns(rollouts, policy, reference, value, temperature)
    for rollout in rollouts:
        own, other = (dense_logprobs(model, rollout.ids, temperature) for model in (policy, reference))
        spread = -(own.exp() * own).sum(-1)[len(rollout.prompt) - 1 : -1]
        expected = {"logprobs": taken(own, rollout), "reference": taken(other, rollout), "entropy": spread}
        for name, numbers in expected.items():
            torch.testing.assert_close(rollout.columns[name].double(), numbers, atol=1e-5, rtol=0, msg=name)
        torch.testing.assert_close(rollout.sampler_logprobs.double(), taken(own, rollout), atol=1e-5, rtol=0)
    assert [len(column(rollouts, name)) for name in ("logprobs", "values")] == [
        sum(len(r.response) for r in rollouts)
    ] * 2


class Place(ScalarModel):
    """Scores each token by its place in its own text."""

    def forward(self, packed: Packed) -> torch.Tensor:
        return packed.positions.float()


def test_a_value_is_that_of_the_state_before_its_token(make_model: MakeModel) -> None:
    """The state in which a response token is chosen ends one token before it; the prompt's tokens have none."""
    rollouts = [episode([5, 6, 7], [8, 9]), episode([5], [6, 7, 0])]
    packed, places = pack_rollouts(rollouts, torch.device("cpu"))
    assert places.tolist() == [3, 4, 6, 7, 8]
    assert response_values(Place(make_model()), packed, places).tolist() == [2, 3, 0, 1, 2]
    policy = make_model()
    fill_columns(rollouts, policy, policy, Place(policy), 1.0)
    assert rollouts[1].columns["values"].tolist() == [0, 1, 2]
    assert torch.equal(column(rollouts, "reference"), column(rollouts, "logprobs"))


def test_the_score_is_read_at_the_last_token_on_prompt_and_response(make_model: MakeModel) -> None:
    rollouts = [episode([5, 6, 7], [8, 9]), episode([5], [6, 7, 8], ended=False), episode([5], [0])]
    for budget in (1, 6, 100):
        score_rollouts(Place(make_model()), rollouts, ScoreScale(mean=1.0, std=2.0, missing_eos_penalty=0.25), budget)
        assert [rollout.score for rollout in rollouts] == [(4 - 1) / 2, (3 - 1) / 2 - 0.25, 0.0]


def test_a_score_of_a_real_reward_model_is_that_of_the_text_alone(
    rollouts: list[Rollout], make_model: MakeModel
) -> None:
    reward = scalar_model(make_model(seed=3), SEED)
    score_rollouts(reward, rollouts, ScoreScale(0.0, 1.0, 0.0), budget=20)
    with torch.no_grad():
        alone = [float(reward(pack([rollout.ids]))[-1]) for rollout in rollouts]
    assert [rollout.score for rollout in rollouts] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_a_deviation_that_cannot_be_divided_by_is_refused(std: float) -> None:
    """A reward model that says one number to everything has the deviation 0."""
    with pytest.raises(ValueError, match=r"score_std = .*allowed: a finite number above 0"):
        ScoreScale(mean=0.0, std=std, missing_eos_penalty=1.0)
