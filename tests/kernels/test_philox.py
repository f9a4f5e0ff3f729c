"""Philox against Random123's known answers, Triton's generator and the laws a stream of draws must keep."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bylaw.kernels.philox import permutation, philox4x32, request_id, uniform, uniform_scalar

# Random123's kat_vectors, lines "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]

TRITON_SCRIPT = """
import json, sys
import torch, triton, triton.language as tl

@triton.jit
def draw(seed, counters, words):
    at = 4 * tl.program_id(0)
    c0, c1 = tl.load(counters + at), tl.load(counters + at + 1)
    c2, c3 = tl.load(counters + at + 2), tl.load(counters + at + 3)
    r0, r1, r2, r3 = tl.philox(tl.load(seed + tl.program_id(0)), c0, c1, c2, c3)
    tl.store(words + at, r0.to(tl.int64))
    tl.store(words + at + 1, r1.to(tl.int64))
    tl.store(words + at + 2, r2.to(tl.int64))
    tl.store(words + at + 3, r3.to(tl.int64))

seeds, counters = (torch.tensor(part) for part in json.loads(sys.argv[1]))
words = torch.zeros(counters.shape, dtype=torch.int64)
draw[(len(seeds),)](seeds, torch.where(counters < 2**31, counters, counters - 2**32).int(), words)
print(json.dumps(words.tolist()))
"""


def rows(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeds, requests and positions [n] over their whole ranges, the negative numbers too."""
    generator = torch.Generator().manual_seed(5)
    seeds, requests = torch.randint(-(2**63), 2**63 - 1, (2, n), generator=generator)
    return seeds, requests, torch.randint(0, 2**32, (n,), generator=generator)


@pytest.mark.parametrize("line", KNOWN_ANSWERS)
def test_known_answers_of_random123(line: str) -> None:
    words = torch.tensor([int(word, 16) for word in line.split()])
    assert torch.equal(philox4x32(key=words[4:6], counters=words[:4]), words[6:])


def test_batch_of_known_answers_and_one_key_for_all() -> None:
    words = torch.tensor([[int(word, 16) for word in line.split()] for line in KNOWN_ANSWERS])
    assert torch.equal(philox4x32(words[:, 4:6], words[:, :4]), words[:, 6:])
    shared = philox4x32(words[0, 4:6], words[:, :4])
    assert torch.equal(shared[0], words[0, 6:])
    assert shared.shape == (3, 4)


def test_words_are_those_of_triton(tmp_path) -> None:
    pytest.importorskip("triton")
    seeds, requests, positions = rows(6)
    counters = torch.stack((positions, requests & 0xFFFFFFFF, requests >> 32 & 0xFFFFFFFF, positions ^ 1), dim=1)
    (tmp_path / "draw.py").write_text(TRITON_SCRIPT)  # a file: the interpreter reads its kernels' source
    command = [sys.executable, str(tmp_path / "draw.py"), json.dumps([seeds.tolist(), counters.tolist()])]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    ours = philox4x32(torch.stack((seeds & 0xFFFFFFFF, seeds >> 32 & 0xFFFFFFFF), dim=1), counters)
    assert json.loads(answer.stdout) == ours.tolist()


def test_uniform_is_the_first_word_of_the_documented_counter() -> None:
    seed, request = 0x0123456789ABCDEF, 0x1122334455667788
    key = torch.tensor([0x89ABCDEF, 0x01234567])
    word = philox4x32(key, torch.tensor([42, 3, 0x55667788, 0x11223344]))[0]
    expected = int(word) // 256 / 2**24
    assert uniform_scalar(seed, request, 42, stream=3) == expected
    assert uniform(torch.tensor([seed]), torch.tensor([request]), torch.tensor([42]), stream=3).tolist() == [expected]


def test_scalar_and_tensor_draw_the_same_numbers() -> None:
    seeds, requests, positions = rows(300)
    seeds[:2], requests[:2], positions[:2] = torch.tensor([-1, -(2**63)]), torch.tensor([0, 2**63 - 1]), 2**32 - 1
    drawn = uniform(seeds, requests, positions, stream=9)
    assert drawn.dtype == torch.float32
    columns = zip(seeds.tolist(), requests.tolist(), positions.tolist(), strict=True)
    assert drawn.tolist() == [uniform_scalar(*row, stream=9) for row in columns]


def test_draws_are_uniform_and_below_one() -> None:
    n = 20_000
    drawn = uniform(torch.tensor(7), torch.tensor(11), torch.arange(n)).double()
    assert 0 <= drawn.min() < 1e-3 and 1 - 1e-3 < drawn.max() < 1
    counts = torch.histc(drawn.float(), bins=20, min=0, max=1)
    chi_square = ((counts - n / 20) ** 2 / (n / 20)).sum()
    assert chi_square < 43.8  # the 0.1 % point at 19 degrees of freedom
    centred = drawn - drawn.mean()
    assert abs((centred[1:] * centred[:-1]).mean() / centred.square().mean()) < 4 / n**0.5


def test_every_argument_changes_the_draw_and_the_batch_does_not() -> None:
    base = (3, 2**40 + 1, 8, 0)
    changed = [(4, *base[1:]), (3 + 2**32, *base[1:]), (3, 1, 8, 0), (3, 2**40 + 2, 8, 0), (3, 2**40 + 1, 9, 0)]
    changed += [(*base[:3], 1)]
    draws = {uniform_scalar(*row) for row in [base, *changed]}
    assert len(draws) == 1 + len(changed)
    seeds, requests, positions = rows(50)
    whole = uniform(seeds, requests, positions)
    assert torch.equal(uniform(seeds[17:18], requests[17:18], positions[17:18]), whole[17:18])
    assert torch.equal(uniform(seeds.flip(0), requests.flip(0), positions.flip(0)), whole.flip(0))


def test_shapes_broadcast_and_may_be_empty() -> None:
    seeds, requests, _ = rows(3)
    ahead = uniform(seeds[:, None], requests[:, None], torch.arange(5))
    assert ahead.shape == (3, 5)
    assert ahead[2, 4] == uniform_scalar(int(seeds[2]), int(requests[2]), 4)
    assert uniform(seeds[:0], requests[:0], requests[:0]).shape == (0,)
    small = torch.tensor([1], dtype=torch.int32)
    assert uniform(small, small, small).tolist() == [uniform_scalar(1, 1, 1)]


def test_bad_draws_are_refused() -> None:
    one = torch.tensor([1])
    with pytest.raises(ValueError, match=r"seed has the dtype torch.float32; allowed: integers"):
        uniform(one.float(), one, one)
    for stream in (-1, 2**32 - 1):
        with pytest.raises(ValueError, match=f"stream is {stream}; allowed: 0 to 4294967294"):
            uniform(one, one, one, stream)
        with pytest.raises(ValueError, match="stream"):
            uniform_scalar(1, 1, 1, stream)
    with pytest.raises(ValueError, match="seed is 9223372036854775808; allowed: a 64-bit number"):
        uniform_scalar(2**63, 1, 1)


def test_request_ids_are_stable_and_unambiguous() -> None:
    # A changed number here would change every sample of every resumed run.
    assert request_id("a", 1) == 6141443155574342627
    cases = [("ab", "c"), ("a", "bc"), ("abc",), ("a", "b", "c"), ("", "abc"), ("abc", "")]
    cases += [(1,), ("1",), (-1,), (11,), (1, 1), ("i1:1",), ("s1:a",), ("\ud800",), ("é",)]
    ids = [request_id(*case) for case in cases]
    assert len(set(ids)) == len(cases)
    assert all(0 <= number < 2**63 for number in ids)


@pytest.mark.parametrize("parts", [(), (1.0,), (None,), (True,), (b"a",)])
def test_request_ids_of_other_things_are_refused(parts: tuple) -> None:
    with pytest.raises(ValueError, match="request_id"):
        request_id(*parts)


def test_permutations_are_shuffles_that_repeat() -> None:
    first = permutation(seed=1, n=1000, epoch=0)
    assert first.dtype == torch.int64
    assert first.sort().values.tolist() == list(range(1000))
    assert torch.equal(first, permutation(seed=1, n=1000, epoch=0))
    others = [permutation(2, 1000, 0), permutation(1, 1000, 1), permutation(1 + 2**32, 1000, 0), torch.arange(1000)]
    assert all((first == other).sum() < 10 for other in others)  # 1 place in 1000 agrees by chance
    assert permutation(1, 0, 0).tolist() == [] and permutation(1, 1, 0).tolist() == [0]


def test_permutations_of_three_are_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(1200):
        order = tuple(permutation(0, 3, epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 20.5  # the 0.1 % point at 5 degrees of freedom


def test_bad_permutations_are_refused() -> None:
    with pytest.raises(ValueError, match="n = -1; allowed"):
        permutation(0, -1, 0)
    with pytest.raises(ValueError, match="epoch is"):
        permutation(0, 1, 2**63)
