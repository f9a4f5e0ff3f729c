"""The kernel of `uniform`: the same bits as the reference, whatever the keys."""

import pytest
import torch
from precision import DEVICE, assert_op, compiled

from bylaw.kernels import philox
from bylaw.kernels.philox import uniform, uniform_scalar


def keys(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeds, requests and positions [n] over their whole ranges, the negative numbers and the ends too."""
    generator = torch.Generator().manual_seed(5)
    seeds, requests = torch.randint(-(2**63), 2**63 - 1, (2, n), generator=generator)
    positions = torch.randint(0, 2**32, (n,), generator=generator)
    ends = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    seeds[:4], requests[:4], positions[:4] = ends, ends.flip(0), torch.tensor([0, 2**32 - 1, 2**31, 1])
    return seeds.to(DEVICE), requests.to(DEVICE), positions.to(DEVICE)


@pytest.mark.parametrize("stream", [0, 1, 2**31, 2**32 - 2])
def test_the_kernel_draws_the_reference_bits(stream: int) -> None:
    rows = keys(130)
    drawn = uniform(*rows, stream, backend="triton")
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, uniform(*rows, stream, backend="reference"))
    columns = zip(*(part.tolist() for part in rows), strict=True)
    assert drawn.tolist() == [uniform_scalar(*row, stream=stream) for row in columns]


def test_shapes_broadcast_and_may_be_empty() -> None:
    seeds, requests, _ = keys(5)
    ahead = uniform(seeds[:, None], requests[:, None], torch.arange(7, device=DEVICE), backend="triton")
    assert ahead.shape == (5, 7)
    assert ahead[4, 6] == uniform_scalar(int(seeds[4]), int(requests[4]), 6)
    assert uniform(seeds[:0], requests[:0], requests[:0], backend="triton").shape == (0,)
    small = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    assert uniform(small, small, small, backend="triton").tolist() == [uniform_scalar(3, 3, 3)]


def test_registered_and_under_torch_compile() -> None:
    rows = keys(9)
    assert_op(philox._uniform, *rows, 4)
    drawn = compiled(lambda *x: uniform(*x, stream=4, backend="triton"))(*rows)
    assert torch.equal(drawn, uniform(*rows, 4, backend="reference"))


def test_refusals() -> None:
    seeds, requests, positions = keys(4)
    with pytest.raises(ValueError, match=r"seed has the dtype torch.float32; allowed: integers"):
        uniform(seeds.float(), requests, positions, backend="triton")
    with pytest.raises(ValueError, match="stream is -1; allowed: 0 to 4294967294"):
        uniform(seeds, requests, positions, -1, backend="triton")
    with pytest.raises(ValueError, match="backend = 'gpu'; allowed: auto, reference, triton, library"):
        uniform(seeds, requests, positions, backend="gpu")
