"""Sampling against softmax in float64, Transformers' logit warpers, and the edges where a draw can go wrong."""

import pytest
import torch
from torch import Tensor

from bylaw.kernels.sample import sample

LAST = 1 - 2.0**-24  # the largest draw of kernels/philox.py


def draw(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample` with the same settings in every row."""
    n = len(logits)
    settings = torch.full((n,), temperature), torch.full((n,), top_k), torch.full((n,), top_p)
    return sample(logits, uniforms, *settings, None if min_p is None else torch.full((n,), min_p))


def grid(n: int) -> Tensor:
    """n draws in the middle of n equal parts of [0, 1): the share of draws in an interval is its width +- 1/n."""
    return (torch.arange(n) + 0.5) / n


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def test_draws_invert_the_cumulative_distribution_in_index_order() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(8, 4)
    uniforms = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, LAST])
    tokens, logprobs = draw(logits, uniforms)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    expected = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4]).log()
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_frequencies_and_logprobs_are_those_of_the_tempered_softmax(temperature: float) -> None:
    n, vocabulary = 4000, 37
    logits = random_logits(1, vocabulary).expand(n, vocabulary)
    tokens, logprobs = draw(logits, grid(n), temperature)
    wanted = (logits[0].double() / temperature).log_softmax(-1)
    shares = torch.bincount(tokens, minlength=vocabulary) / n
    assert (shares - wanted.exp()).abs().max() <= 1 / n + 1e-6
    torch.testing.assert_close(logprobs.double(), wanted[tokens], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        *((5, 1.0, 0.0), (1, 1.0, 0.0), (0, 0.6, 0.0), (0, 1e-6, 0.0), (7, 0.8, 0.0), (100, 0.95, 0.0), (36, 1.0, 0.0)),
        *((0, 1.0, 0.1), (0, 1.0, 1.0), (9, 0.8, 0.2), (0, 0.5, 1e-9)),
    ],
)
def test_limits_agree_with_transformers(top_k: int, top_p: float, min_p: float) -> None:
    from transformers.generation import logits_process as hf

    n, temperature = 4000, 0.8
    logits = random_logits(1, 37, seed=3)
    ids = torch.zeros(1, 1, dtype=torch.long)
    wanted = hf.TemperatureLogitsWarper(temperature)(ids, logits)  # pyright: ignore[reportArgumentType]
    if top_k:
        wanted = hf.TopKLogitsWarper(top_k)(ids, wanted)  # pyright: ignore[reportArgumentType]
    if top_p < 1:
        wanted = hf.TopPLogitsWarper(top_p)(ids, wanted)  # pyright: ignore[reportArgumentType]
    if min_p:
        wanted = hf.MinPLogitsWarper(min_p)(ids, wanted)  # pyright: ignore[reportArgumentType]
    wanted = wanted[0].double().log_softmax(-1)
    tokens, logprobs = draw(logits.expand(n, 37), grid(n), temperature, top_k, top_p, min_p)
    shares = torch.bincount(tokens, minlength=37) / n
    assert (shares - wanted.exp()).abs().max() <= 1 / n + 1e-6
    torch.testing.assert_close(logprobs.double(), wanted[tokens], atol=1e-5, rtol=0)


def test_ties_keep_exactly_k_tokens_and_the_lower_index() -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0]).expand(100, 4)
    tokens, logprobs = draw(logits, grid(100), top_k=2)
    assert tokens.unique().tolist() == [1, 2]
    torch.testing.assert_close(logprobs, torch.full((100,), 0.5).log())
    assert draw(logits, grid(100), top_p=0.1)[0].unique().tolist() == [1]


def test_a_token_hardly_likelier_is_no_tie() -> None:
    logits = torch.tensor([1e-9, 2e-9, 30.0]).expand(100, 3)  # less 30, the first two are the same float32
    for top_k, top_p in [(2, 1.0), (0, 0.6)]:
        assert draw(logits, grid(100), 50.0, top_k, top_p)[0].unique().tolist() == [1, 2]


def test_min_p_cuts_what_top_p_left() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(100, 3)
    assert draw(logits, grid(100), top_p=0.6, min_p=0.5)[0].unique().tolist() == [0, 1]  # of 0.5 and 0.3
    # Had min_p come first, top_p would have seen 0.625 and 0.375, and stopped at the first.
    assert draw(logits, grid(100), min_p=0.7)[0].unique().tolist() == [0]
    unlimited = draw(logits, grid(100))
    assert all(torch.equal(*pair) for pair in zip(draw(logits, grid(100), min_p=0.0), unlimited, strict=True))


def test_temperature_zero_is_argmax_with_the_logprob_at_temperature_one() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 1.0, 2.0, 3.0]])
    tokens, logprobs = draw(logits, torch.tensor([LAST, LAST]), temperature=0.0, top_k=1, top_p=0.5, min_p=1.0)
    assert tokens.tolist() == [1, 0]  # the first of a tie
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])


def test_rows_do_not_see_each_other() -> None:
    n = 12
    logits, uniforms = random_logits(n, 501, seed=1), grid(n).flip(0)
    temperature = torch.tensor([1.0, 0.0, 0.5] * 4)
    top_k = torch.tensor([0, 0, 4, 0, 9, 0] * 2)
    top_p = torch.tensor([1.0, 1.0, 1.0, 0.7] * 3)
    parts = logits, uniforms, temperature, top_k, top_p, torch.tensor([0.0, 0.2, 0.0, 0.0, 0.0, 0.1] * 2)
    whole = sample(*parts)
    for i in range(n):
        alone = sample(*(part[i : i + 1] for part in parts))
        assert alone[0][0] == whole[0][i] and alone[1][0] == whole[1][i]  # the same bits


def test_a_batch_without_limits_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("sorted")

    for name in ("sort", "argsort", "topk"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
        monkeypatch.setattr(torch, name, refuse)
    logits = random_logits(3, 20)
    draw(logits, grid(3))
    draw(logits, grid(3), top_k=20)  # as many as there are: no limit
    draw(logits, grid(3), temperature=0.0, top_k=2, top_p=0.5)
    with pytest.raises(AssertionError, match="sorted"):
        draw(logits, grid(3), top_k=2)


@pytest.mark.parametrize("uniform", [0.0, 2.0**-24, 0.5, LAST])
def test_no_draw_has_probability_zero(uniform: float) -> None:
    ninf = float("-inf")
    logits = torch.tensor(
        [
            [ninf, ninf, 0.0, 1.0, ninf, ninf],
            [-2000.0, 0.0, 0.0, 0.0, -2000.0, -2000.0],  # exp is 0 in float64, too
            [-110.0, 0.0, -110.0, ninf, -110.0, -110.0],  # exp is 0 in float32
        ]
    )
    tokens, logprobs = draw(logits, torch.full((3,), uniform))
    assert tokens[0] in (2, 3) and tokens[1] in (1, 2, 3) and tokens[2] == 1
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("vocabulary", [3, 1000, 50_257])
def test_the_last_draw_is_safe_however_the_sum_is_rounded(vocabulary: int) -> None:
    logits = random_logits(4, vocabulary)
    logits[:, -2:] = float("-inf")
    logits[2:] = torch.where(logits[2:].isinf(), logits[2:], 0.1)  # equal shares: the worst rounding
    for top_p in (1.0, 0.9):
        tokens, logprobs = draw(logits, torch.full((4,), LAST), top_p=top_p)
        assert (tokens < vocabulary - 2).all() and logprobs.isfinite().all()


def test_a_truncated_token_is_never_drawn() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[3, 0, 2, 1]].expand(3, 4)  # the likeliest in the middle
    uniforms = torch.tensor([0.0, 0.5, LAST])
    assert draw(logits, uniforms, top_k=2)[0].tolist() == [1, 1, 3]
    assert draw(logits, uniforms, top_p=0.7)[0].tolist() == [1, 1, 3]
    assert draw(logits, uniforms, top_p=0.45)[0].tolist() == [1, 1, 1]


def test_top_p_counts_the_probabilities_that_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(200, 4)
    # Of the first two, 4/7 and 3/7: 0.5 is reached by the first alone, though 0.4 < 0.5 before the cut.
    assert draw(logits, grid(200), top_k=2, top_p=0.5)[0].unique().tolist() == [0]
    assert draw(logits, grid(200), top_p=0.5)[0].unique().tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45])
def test_a_tiny_temperature_is_argmax_without_nan(temperature: float) -> None:
    logits = torch.tensor([[900.0, 1000.0, -1000.0], [-7.0, -8.0, -9.0]])
    tokens, logprobs = draw(logits, torch.tensor([0.0, LAST]), temperature)
    assert tokens.tolist() == [1, 0] and logprobs.tolist() == [0.0, 0.0]


def test_odd_layouts_and_dtypes() -> None:
    logits = random_logits(30, 4).t()  # not contiguous
    tokens, logprobs = draw(logits, grid(4), top_p=0.9)
    again, _ = draw(logits.contiguous(), grid(4), top_p=0.9)
    assert torch.equal(tokens, again) and logprobs.shape == (4,)
    assert draw(logits.double(), grid(4))[1].dtype == torch.float64
    half = draw(logits.bfloat16(), grid(4))
    assert half[1].dtype == torch.float32
    torch.testing.assert_close(half[1], draw(logits.bfloat16().float(), grid(4))[1])


def test_empty_batch_and_one_token() -> None:
    tokens, logprobs = draw(torch.zeros(0, 5), torch.zeros(0))
    assert tokens.shape == logprobs.shape == (0,) and tokens.dtype == torch.int64
    tokens, logprobs = draw(torch.tensor([[3.0]]), torch.tensor([LAST]), top_k=1, top_p=0.5)
    assert tokens.tolist() == [0] and logprobs.tolist() == [0.0]


def test_inputs_are_left_as_they_were() -> None:
    logits = random_logits(2, 9)
    before = logits.clone()
    draw(logits, grid(2), top_k=3)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_broken_logits_are_refused(broken: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1] = broken
    with pytest.raises(ValueError, match=r"the largest logit of row 1 is (nan|inf|-inf); allowed: finite"):
        draw(logits, grid(3))
    single = torch.zeros(3, 4)
    single[2, 3] = float("nan")
    with pytest.raises(ValueError, match="row 2 is nan"):
        draw(single, grid(3), temperature=0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("uniforms", 1.0), ("uniforms", -0.1), ("uniforms", float("nan"))),
        *(("temperature", -1.0), ("temperature", float("inf")), ("temperature", float("nan"))),
        *(("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan"))),
        *(("min_p", -0.1), ("min_p", 1.1), ("min_p", float("nan"))),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    ones = torch.ones(2)
    settings = {n: ones.clone() for n in ("uniforms", "temperature", "top_k", "top_p", "min_p")}
    settings |= {"uniforms": grid(2), "top_k": ones.long()}
    settings[name][1] = value
    with pytest.raises(ValueError, match=rf"{name} of row 1 is .*; allowed: "):
        sample(torch.zeros(2, 3), *settings.values())


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits have the shape \(4,\)"):
        draw(torch.zeros(4), grid(4))
    with pytest.raises(ValueError, match=r"logits have the shape \(2, 0\)"):
        draw(torch.zeros(2, 0), grid(2))
    with pytest.raises(ValueError, match=r"uniforms has the shape \(1,\); allowed: \(2,\)"):
        draw(torch.zeros(2, 4), grid(1))
    with pytest.raises(ValueError, match=r"min_p has the shape \(1,\); allowed: \(2,\)"):
        sample(torch.zeros(2, 4), grid(2), torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(1))
    with pytest.raises(ValueError, match=r"top_p is on meta; allowed: cpu, where the logits are"):
        sample(torch.zeros(2, 4), grid(2), torch.ones(2), torch.ones(2), torch.ones(2, device="meta"))
