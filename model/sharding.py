"""How a model lies on many ranks: which dimension of a parameter is shared out, and what makes its modules work so.

Tensor parallelism is Megatron-LM's (Shoeybi et al. 2019, arXiv 1909.08053, section 3): qkv and gate_up are cut by rows,
so that each rank has whole heads and whole gates, out and down by columns; a block talks to the others twice. Embedding
and head stay whole. Data ranks share out what is left of each matrix by FSDP2, along the dimension that tensor ranks do
not cut; vectors and adapters are small and stay whole.

So a rank's part of every Hugging Face tensor is a block of its rows and columns, which checkpoints are read into and
written from at any number of ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bylaw.model.heads import ScalarModel
from bylaw.model.parallel import DATA, TENSOR, Parallel
from bylaw.model.transformer import Block, Transformer

ROWS_CUT, COLUMNS_CUT = ("qkv", "gate_up"), ("out", "down")
PARTIAL = ("q_norm", "k_norm")  # of whose gradient a tensor rank has the part of its heads
ADAPTER = "lora_"
Named = Sequence[tuple[str, nn.Parameter]]


def tensor_dim(name: str) -> int | None:
    """The dimension of the parameter `name` that tensor ranks share out; None: each has it whole."""
    module, kind = name.split(".")[-2:] if "." in name else ("", name)
    if module in ROWS_CUT:
        return 0
    return 1 if module in COLUMNS_CUT and kind == "weight" else None


def data_dim(name: str, dims: int) -> int | None:
    """The dimension of the parameter `name`, of `dims` dimensions, that data ranks share out; None: each has it whole.

    Never the one that tensor ranks cut: fused rows of several tensors would fall apart.
    """
    if dims < 2 or ADAPTER in name:
        return None
    return 0 if tensor_dim(name) == 1 else 1


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or of its gradient, without a copy."""
    # A DTensor is told by its method: its class takes seconds to import, and most programs have none.
    return getattr(tensor, "to_local", lambda: tensor)()


def is_shared_out(parameter: Tensor) -> bool:
    """Whether data ranks have a part each."""
    return hasattr(parameter, "to_local")


class RowsCut(nn.Linear):
    """A linear layer of which this rank has some of the rows, that is, of the outputs."""

    group: Any

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(_Enter.apply(input, self.group), self.weight, self.bias)  # pyright: ignore[reportArgumentType]


class ColumnsCut(nn.Linear):
    """A linear layer of which this rank has some of the columns; its outputs are the sum over ranks."""

    group: Any

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = _Join.apply(F.linear(input, self.weight), self.group)  # pyright: ignore[reportAssignmentType]
        return out if self.bias is None else out + self.bias


class _Enter(torch.autograd.Function):
    """The same on all ranks going in; coming back, the sum of what each found."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.group), None


class _Join(torch.autograd.Function):
    """The sum of what each rank has; coming back, the same for all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _sum(x: Tensor, group: Any) -> Tensor:
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))


def shard(model: Transformer | ScalarModel, parallel: Parallel) -> None:
    """Spread `model` over the ranks, in place; it may be on the meta device. With one process, nothing.

    Raises ValueError for sizes that the ranks do not divide.
    """
    if parallel.alone:
        return
    trunk = model.trunk if isinstance(model, ScalarModel) else model
    check_divides(trunk, parallel)
    if parallel.tensor_ranks > 1:
        _cut(trunk, parallel)
    if parallel.shares:
        _share_out(model, trunk, parallel)


def check_divides(trunk: Transformer, parallel: Parallel) -> None:
    """Raise ValueError unless the ranks divide the model's sizes."""
    config, tensor = trunk.config, parallel.tensor_ranks
    wanted = [("num_kv_heads", config.num_kv_heads, tensor), ("intermediate_size", config.intermediate_size, tensor)]
    wanted += [("hidden_size", config.hidden_size, parallel.data_ranks)]
    for name, size, ranks in wanted:
        if size % ranks:
            kind = "data" if name == "hidden_size" else "tensor-parallel"
            raise ValueError(
                f"{name} = {size} cannot be shared out to {ranks} {kind} ranks; allowed: a number of ranks that "
                "divides it"
            )


def _cut(trunk: Transformer, parallel: Parallel) -> None:
    ranks, group = parallel.tensor_ranks, parallel.mesh.get_group(TENSOR)
    for block in trunk.blocks:
        for name in (*ROWS_CUT, *COLUMNS_CUT):
            setattr(block, name, _cut_linear(getattr(block, name), name, ranks, group))
        assert isinstance(block, Block)
        block.heads //= ranks
        block.kv_heads //= ranks


def _cut_linear(whole: nn.Linear, name: str, ranks: int, group: Any) -> nn.Linear:
    """Memory for this rank's part. Its values are read from a checkpoint."""
    assert type(whole) is nn.Linear, "adapters are added after a model is cut"
    rows = ranks if name in ROWS_CUT else 1
    part = (RowsCut if name in ROWS_CUT else ColumnsCut)(
        whole.in_features // (ranks // rows),
        whole.out_features // rows,
        bias=whole.bias is not None,
        device=whole.weight.device,
        dtype=whole.weight.dtype,
    )
    part.group = group
    return part


def back_to_shards(model: nn.Module) -> None:
    """A pass without a backward leaves FSDP2's root whole, and `parameters` would name tensors that nobody trains."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # pyright: ignore[reportCallIssue]


def _share_out(model: nn.Module, trunk: Transformer, parallel: Parallel) -> None:
    """FSDP2 over the blocks, one by one, and over the rest, which stays whole from a forward pass to its backward: the
    losses read the head's weight after the forward pass.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    dims = {p: data_dim(name, p.dim()) for name, p in model.named_parameters()}
    whole = {p for p, dim in dims.items() if dim is None}
    places = {p: Shard(dim) for p, dim in dims.items() if dim is not None}
    # Gradients are summed in float32; they are divided by the tokens of the whole step, not by the ranks.
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings: dict[str, Any] = {
        "mesh": parallel.mesh[DATA],
        "mp_policy": precision,
        "ignored_params": whole,
        "shard_placement_fn": places.get,
    }
    for block in trunk.blocks:
        fully_shard(block, **settings)
    fully_shard(model, reshard_after_forward=False, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor


@torch.no_grad()
def sum_whole_gradients(named: Named, parallel: Parallel) -> None:
    """Sum over the ranks the gradients of the parameters that each rank has whole: FSDP2 has summed the others'."""
    if parallel.alone:
        return
    _sum_together([p for _, p in named if not is_shared_out(p)], parallel, DATA)
    if parallel.tensor_ranks > 1:
        _sum_together([p for name, p in named if name.split(".")[-2:][0] in PARTIAL], parallel, TENSOR)


def _sum_together(parameters: list[nn.Parameter], parallel: Parallel, axis: str) -> None:
    """In one message."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return
    flat = parallel.add(torch.cat([grad.flatten().float() for grad in grads]), axis)
    for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


@torch.no_grad()
def gradient_norm(named: Named, parallel: Parallel) -> Tensor:
    """The Euclidean norm of all gradients together, over all ranks, in float32 or wider whatever their dtypes are."""
    found = [(name, p, local(p.grad)) for name, p in named if p.grad is not None]
    if not found:
        return torch.zeros(())
    wide = torch.promote_types(found[0][2].dtype, torch.float32)
    norms = torch.stack(torch._foreach_norm([grad for *_, grad in found], 2.0, dtype=wide))  # pyright: ignore[reportPrivateImportUsage]
    if parallel.alone:
        return torch.linalg.vector_norm(norms)
    squares = norms.double().square()
    by_data = torch.tensor([is_shared_out(p) for _, p, _ in found], device=squares.device)
    by_tensor = torch.tensor([tensor_dim(name) is not None for name, *_ in found], device=squares.device)
    over_data = parallel.add(torch.stack([(squares * by_data * kind).sum() for kind in (~by_tensor, by_tensor)]))
    over_tensor = over_data[1] + (squares * ~by_data * by_tensor).sum()
    if parallel.tensor_ranks > 1:
        over_tensor = parallel.add(over_tensor[None], TENSOR)[0]
    return (over_data[0] + over_tensor + (squares * ~by_data * ~by_tensor).sum()).sqrt().float()
