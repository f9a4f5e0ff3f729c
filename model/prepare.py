"""What training may do to a transformer's blocks for memory and speed: recompute activations, compile.

Only packed streams run blocks so (their `trains`); a sampling engine runs them as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bylaw.model.lora import recomputing
from bylaw.model.settings import Recompute
from bylaw.model.transformer import Block, Transformer

Contexts = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]
SAVED = ("aten::mm", "aten::addmm", "aten::bmm")


def prepare(model: nn.Module, recompute: Recompute = "none", compile: bool = False, backend: str = "inductor") -> None:
    """Make each block in `model`, when it runs for training,

    recompute in the backward pass all its activations ("full": one hidden state per block and token is kept) or those
    that are not outputs of a matrix product or of attention ("selective", as in Korthikanti et al. 2022, arXiv
    2205.05198, section 5: what is cheap to compute again);
    run through torch.compile, once for all numbers of tokens.

    The gradients are the same: to the bit without `compile`, which may round differently. Raises ValueError for another
    `recompute`.
    """
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute = {recompute!r}; allowed: {', '.join(get_args(Recompute))}")
    for trunk in (module for module in model.modules() if isinstance(module, Transformer)):
        for block in trunk.blocks:
            assert isinstance(block, Block)
            run: Callable[..., Any] = block.run
            if recompute != "none":
                run = partial(_recomputed, run, trunk, recompute)
            if compile:
                # Dynamo counts by source line, so that blocks of all models share its limit of 8.
                many = torch._dynamo.config.patch(recompile_limit=64)
                run = many(torch.compile(run, dynamic=True, backend=backend))
            block.prepared = run if compile or recompute != "none" else None


def _recomputed(
    run: Callable[..., Any], trunk: Transformer, recompute: Recompute, *inputs: Any
) -> tuple[Tensor, Tensor]:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return run(*inputs)
    # No block draws anything, so there is no generator's state to keep.
    contexts = partial(_contexts, recomputing(trunk), recompute)
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _contexts(adapter: Contexts, recompute: Recompute) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What the forward pass and the recomputation run in."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    if recompute == "full":
        return adapter()
    forward, again = zip(adapter(), create_selective_checkpoint_contexts(_policy), strict=True)
    return _both(*forward), _both(*again)


@contextmanager
def _both(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield


def _policy(context: Any, operation: Any, *inputs: Any, **options: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    name = operation.name()
    kept = name in SAVED or (("attention" in name or "flash" in name) and "backward" not in name)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
