"""Whose weights the engine samples from. Two gloo processes on the CPU stand for the ranks of a torchrun program."""

import contextlib
import copy
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from bylaw.model.checkpoint import load_model, save_model
from bylaw.model.config import ModelConfig
from bylaw.model.engine import Engine, Request
from bylaw.model.engine.pages import Pages
from bylaw.model.engine.ranks import pull
from bylaw.model.engine.slabs import Slabs
from bylaw.model.engine.store import page_bytes
from bylaw.model.engine.weights import sampling_phase, weight_version
from bylaw.model.optim import MasterAdamW
from bylaw.model.packing import pack
from bylaw.model.parallel import DATA, TENSOR, Parallel
from bylaw.model.transformer import Transformer, initialize

SEQUENCES = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9], [3]]


def _tiny(seed: int = 0, kv_heads: int = 1) -> Transformer:
    config = ModelConfig(
        family="llama", vocab_size=11, hidden_size=16, intermediate_size=20, num_layers=2, num_heads=2,
        num_kv_heads=kv_heads, head_dim=6, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return initialize(Transformer(config), seed)


def _backward(model: nn.Module) -> Tensor:
    loss = model(pack(SEQUENCES)).square().mean()
    loss.backward()
    return loss.detach()


def _step(optimizer: type[torch.optim.Optimizer], **settings: Any) -> Callable[[Transformer], None]:
    def change(model: Transformer) -> None:
        _backward(model)
        optimizer(model.parameters(), **settings).step()  # pyright: ignore[reportCallIssue]

    return change


def _write_data(model: Transformer) -> None:
    weight = model.get_parameter("blocks.1.down.weight")
    before = weight._version
    weight.data.copy_(weight.data + 1e-6)
    assert weight._version == before  # the reason why the values are read


def _swap_neighbours(model: Transformer) -> None:
    row = model.embed.weight.data[4]
    row[[2, 3, 4, 5]] = row[[4, 5, 2, 3]]


def _swap_rows(model: Transformer) -> None:
    model.embed.weight.data[[4, 7]] = model.embed.weight.data[[7, 4]]


def _one_up_one_down(model: Transformer) -> None:
    bits = model.norm.weight.data.view(torch.int32)
    bits[3] += 1
    bits[11] -= 1


def _add_adapter(model: Transformer) -> None:
    model.blocks[0].get_submodule("qkv").register_parameter("lora_b", nn.Parameter(torch.zeros(4, 16)))


CHANGES = {
    "data": _write_data,
    "load": lambda model: model.load_state_dict(_tiny(seed=1).state_dict()),
    "adapter": _add_adapter,
    "buffer": lambda model: model.inv_freq.mul_(2),
    "dtype": lambda model: model.double(),
    "neighbours": _swap_neighbours,
    "rows": _swap_rows,
    "cancelling": _one_up_one_down,
    "fused": _step(torch.optim.AdamW, lr=1e-4, fused=True),
    "foreach": _step(torch.optim.AdamW, lr=1e-4, foreach=True),
    "sgd": _step(torch.optim.SGD, lr=1e-4),
    "master": lambda model: _step(MasterAdamW, lr=1e-2)(model.bfloat16()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_version_tells_changed_weights(change: str) -> None:
    model = _tiny()
    before = weight_version(model)
    CHANGES[change](model)
    assert weight_version(model) != before


def test_the_version_changes_with_any_bit_and_comes_back() -> None:
    model = _tiny().bfloat16()
    versions = {weight_version(model)}
    for parameter in model.parameters():
        bits = parameter.data.view(torch.int16).view(-1)
        for place in (0, len(bits) // 2, len(bits) - 1):
            bits[place] ^= 1
            versions.add(weight_version(model))
            bits[place] ^= 1
    assert len(versions) == 1 + 3 * len(list(model.parameters()))
    assert weight_version(model) in versions and weight_version(_tiny().bfloat16()) == weight_version(model)


def test_the_version_stays_without_a_change() -> None:
    model = _tiny()
    before = weight_version(model)
    _backward(model)
    with torch.inference_mode():
        assert weight_version(model) == before
    assert weight_version(copy.deepcopy(model)) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_the_version_reads_tensors_of_any_shape(dtype: torch.dtype) -> None:
    flat = torch.arange(30.0).to(dtype)
    views = {
        "odd": flat.view(2, 15), "offset": flat[1:], "scalar": flat[3], "empty": flat[:0], "cube": flat.view(5, 3, 2),
        "turned": flat.view(3, 10).T, "strided": flat[::2],
    }  # fmt: skip
    versions = set()
    for view in views.values():
        model = nn.Module()
        model.register_buffer("weight", view)
        versions.add(weight_version(model))
        model.weight = view.clone()
        assert weight_version(model) in versions
    assert len(versions) == len(views)


def test_sums_do_not_depend_on_the_pieces_they_are_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _tiny()
    before = weight_version(model)
    monkeypatch.setattr("bylaw.model.engine.weights.CACHED", 8)
    assert weight_version(model) == before


def test_a_phase_without_shards_copies_nothing() -> None:
    model = _tiny()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    with sampling_phase(model):
        assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_a_lone_process_does_all_the_work() -> None:
    assert (list(pull(3)), list(pull(0))) == ([0, 1, 2], [])
    with pytest.raises(ValueError, match="count = -1"):
        pull(-1)


def _shard(model: Transformer, together: bool = False, **policy: Any) -> Transformer:
    """Each block and the root as units of FSDP2, or the blocks `together` as one."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for unit in [list(model.blocks)] if together else model.blocks:
        fully_shard(unit, mp_policy=MixedPrecisionPolicy(**policy))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(**policy))
    return model


def _whole(model: nn.Module) -> list[bool]:
    return [not hasattr(parameter, "to_local") for parameter in model.parameters()]


def _train_and_sample(rank: int) -> dict[str, Any]:
    """What the sharded model gives on this rank, each beside what the plain model gives."""
    plain, sharded = _tiny(), _shard(_tiny())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (plain, sharded)]
    shards = list(sharded.parameters())
    seen: dict[str, Any] = {"whole": [], "versions": [], "hidden": [], "losses": []}
    for _ in range(2):  # the first phase is before any forward of the sharded model
        with torch.inference_mode(), sampling_phase(sharded):
            seen["versions"].append((weight_version(sharded), weight_version(plain)))
            for ids in SEQUENCES[: 1 + 3 * rank]:  # no rank waits for another, nor does an engine's own phase
                with sampling_phase(sharded):
                    seen["hidden"].append((sharded(pack([ids])).clone(), plain(pack([ids])).clone()))
            seen["whole"].append(_whole(sharded))
        seen["whole"].append(_whole(sharded))
        with contextlib.suppress(KeyError), sampling_phase(sharded):
            raise KeyError(rank)
        seen["whole"].append(_whole(sharded))
        for _ in range(2):
            seen["losses"].append((_backward(sharded), _backward(plain)))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    with torch.no_grad():
        sharded(pack(SEQUENCES))  # leaves the root's own parameters whole, as they are now
        for shard, parameter in zip(shards, plain.parameters(), strict=True):
            shard.mul_(0.5)
            parameter.mul_(0.5)
        with sampling_phase(sharded):
            seen["hidden"].append((sharded(pack(SEQUENCES)), plain(pack(SEQUENCES))))
    return seen


def _sample_in_16_bits() -> dict[str, Any]:
    plain = _tiny()
    for parameter in plain.parameters():  # not its buffer: FSDP2 casts parameters only
        parameter.data = parameter.data.bfloat16()
    sharded = _shard(_tiny(), together=True, param_dtype=torch.bfloat16, cast_forward_inputs=False)
    with torch.no_grad(), sampling_phase(sharded):
        hidden = sharded(pack(SEQUENCES)), plain(pack(SEQUENCES))
    refusals, casts = [], ({"param_dtype": torch.bfloat16}, {"output_dtype": torch.float64})
    for policy in casts:
        casting = _shard(_tiny(), together=False, **policy)
        with pytest.raises(ValueError) as refused, sampling_phase(casting):
            pass
        refusals.append(str(refused.value))
    return {"hidden": hidden, "refusals": refusals}


def _share(rank: int) -> dict[str, Any]:
    """Work in two rounds, of which rank 0 takes one piece each and is then busy until rank 1 has done the rest; and
    work of two ranks of one tensor group.
    """
    parallel = _place(rank, (2, 1))
    seen: dict[str, Any] = {"taken": []}
    for count in (4, 2):
        pieces = pull(count, parallel)
        mine = [next(pieces)] if rank == 0 else []
        dist.barrier()
        mine += list(pieces) if rank == 1 else []
        dist.barrier()
        mine += list(pieces)
        seen["taken"].append(mine)
    seen["together"] = list(pull(3, _place(rank, (1, 2))))
    if rank == 0:
        with pytest.raises(RuntimeError) as stuck:
            replace(parallel, timeout=timedelta(seconds=0.5)).meet()
        seen["stuck"] = str(stuck.value)
    dist.barrier()
    return seen


def _sample_cut(rank: int, folder: Path) -> dict[str, Any]:
    """What a model of which each rank has half of the heads says, beside the whole one."""
    whole, parallel = _tiny(kv_heads=2), _place(rank, (1, 2))
    if rank == 0:
        save_model(whole, folder / "whole")
    dist.barrier()
    cut = load_model(folder / "whole", parallel=parallel)
    requests = [Request(prompt=ids, max_tokens=9, seed=4, request=n) for n, ids in enumerate(SEQUENCES)]
    said = [[done.ids for done in Engine(model, max_rows=2).generate(requests)] for model in (cut, whole)]
    scored = [Engine(model).score([([3, 1, 4], [[1], [5, 9]])])[0] for model in (cut, whole)]
    shapes = [Slabs(cut, 8, 2).keys[0].shape[1], Pages(cut, 8, 2).shape[4], page_bytes(whole) // page_bytes(cut)]
    return {"said": said, "scored": scored, "heads": shapes}


def _place(rank: int, shape: tuple[int, int]) -> Parallel:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=(DATA, TENSOR))
    ranks = [rank if size == 2 else 0 for size in shape]
    return Parallel(ranks[0], shape[0], ranks[1], shape[1], mesh, control=dist.new_group(backend="gloo"))


def _run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=30), world_size=2, rank=rank)
    seen = {"train": _train_and_sample(rank), "low": _sample_in_16_bits(), "share": _share(rank)}
    seen["cut"] = _sample_cut(rank, folder)
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw. They are forks of one fresh process, so that torch is imported once for both."""
    multiprocessing.set_forkserver_preload([__name__, "torch.distributed.fsdp"])
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(_run_rank, (folder,), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_shards_are_whole_within_a_phase_only(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert [all(whole) for whole in rank["train"]["whole"]] == [True, False, False] * 2
        assert not any(sum(whole) for whole in rank["train"]["whole"] if not all(whole))


def test_ranks_sample_as_many_times_as_they_like_as_from_the_plain_model(seen: list[dict[str, Any]]) -> None:
    for rank, forwards in zip(seen, (1, 4), strict=True):
        assert len(rank["train"]["hidden"]) == 2 * forwards + 1
        for sharded, plain in [*rank["train"]["hidden"], rank["low"]["hidden"]]:
            torch.testing.assert_close(sharded, plain, atol=1e-6, rtol=0)


def test_every_rank_knows_the_version_of_the_plain_weights(seen: list[dict[str, Any]]) -> None:
    (first, plain), (second, _) = seen[0]["train"]["versions"]
    assert first == plain != second
    assert [version for version, _ in seen[1]["train"]["versions"]] == [first, second]


def test_training_goes_on_between_phases(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        losses = torch.tensor(rank["train"]["losses"])
        torch.testing.assert_close(losses[:, 0], losses[:, 1], atol=1e-6, rtol=0)
        assert losses[:, 0].unique().numel() == 4


def test_ranks_that_share_out_heads_say_what_the_whole_model_says(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        cut, whole = rank["cut"]["said"]
        assert cut == whole and len({tuple(ids) for ids in cut}) > 1
        torch.testing.assert_close(*(torch.tensor(scores) for scores in rank["cut"]["scored"]), atol=1e-5, rtol=0)
        assert rank["cut"]["heads"] == [1, 1, 2]  # a rank keeps the keys of its own heads only


def test_a_policy_that_casts_inputs_or_outputs_is_refused(seen: list[dict[str, Any]]) -> None:
    assert all("cast_forward_inputs=False" in refusal for rank in seen for refusal in rank["low"]["refusals"])


def test_a_rank_takes_the_work_that_a_busy_one_leaves(seen: list[dict[str, Any]]) -> None:
    assert [rank["share"]["taken"] for rank in seen] == [[[0], [0]], [[1, 2, 3], [1]]]


def test_ranks_of_a_tensor_group_do_the_same_work(seen: list[dict[str, Any]]) -> None:
    assert [rank["share"]["together"] for rank in seen] == [[0, 1, 2], [0, 1, 2]]


def test_a_rank_that_does_not_come_is_named(seen: list[dict[str, Any]]) -> None:
    assert "Ranks 1 " in seen[0]["share"]["stuck"]
