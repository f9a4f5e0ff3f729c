"""The training bench times what both sides compute alike, says which peer is missing, and counts FLOPs as by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bylaw.benchmarks import training as bench
from bylaw.benchmarks import training_alone as alone
from bylaw.benchmarks import training_ours as ours
from bylaw.benchmarks import training_peer as peer
from bylaw.benchmarks.training_check import TOLERANCE, Mismatch, agreement
from bylaw.benchmarks.training_config import ALONE, QUICK, WAYS, Sizes, TrainingConfig, ways
from bylaw.benchmarks.training_flops import block_weights, forward_flops, peak, training_flops
from bylaw.benchmarks.training_side import SideFailed, Task, answer
from bylaw.benchmarks.training_workloads import (
    EOS,
    PAD,
    SHAPES,
    as_shuffled,
    ending,
    episodes,
    examples,
    filled,
    lengths,
    pairs,
    questions,
    write_models,
)
from bylaw.model.config import ModelConfig
from bylaw.model.packing import pack
from bylaw.model.transformer import Transformer, initialize

OURS = "bylaw.benchmarks.training_ours"
SMALL = ModelConfig(
    family="llama", vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=2, max_position_embeddings=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    write_models(place, "tiny", QUICK)
    return place


@pytest.fixture
def task(folder: Path) -> Callable[..., Task]:
    return lambda kind, maker="", way="": Task(kind, maker, folder, QUICK, 1, way)


def test_lengths_are_those_that_the_issue_names() -> None:
    """Mean 100, longest 256, and so 39 % of a padded batch is text; each seed has the same lengths in its own order."""
    sizes = Sizes()
    drawn = lengths(sizes.examples, sizes.example, seed=1)
    assert sum(drawn) / len(drawn) == pytest.approx(100, rel=0.01) and max(drawn) == 256
    assert filled(drawn, len(drawn)) == pytest.approx(0.39, abs=0.005)
    other = lengths(sizes.examples, sizes.example, seed=2)
    assert other != drawn and sorted(other) == sorted(drawn)
    assert sizes.response[0] == pytest.approx(0.4 * sizes.response[1])
    shared = [len(one.prompt) / (len(one.prompt) + len(one.chosen)) for one in pairs(sizes, 8192, 0)]
    assert 0.45 < sum(shared) / len(shared) < 0.6
    assert max(len(one.prompt) + len(one.chosen) for one in pairs(sizes, 8192, 0)) <= 256


def test_filled_by_hand() -> None:
    assert filled([1, 3, 2, 2, 5], rows=2) == 13 / (6 + 4 + 5)


def test_the_policy_ends_by_chance_as_often_as_it_should() -> None:
    """An exponential with a mean of 4.8, cut off at 12, has a scale of 5.45; and padding is never drawn."""
    model = ending(initialize(Transformer(SHAPES["tiny"]), seed=3), QUICK)
    with torch.no_grad():
        chances = model.logits(model(pack(questions(QUICK, 128, 5)))).softmax(-1)
    assert float(chances[:, EOS].mean()) == pytest.approx(1 / 5.45, rel=0.1)
    assert float(chances[:, PAD].max()) < 1e-12


def test_our_sides_do_the_work_that_is_timed(task: Callable[..., Task], capsys: pytest.CaptureFixture[str]) -> None:
    texts = examples(QUICK, 128, 1)
    sft = ours.sft(task("sft"))
    run = sft.prepare(1)
    told = run.told(run.work())
    assert told["useful"] == sum(map(len, texts))
    first = as_shuffled(texts, 1)[: QUICK.batch]
    assert told["loss"] == pytest.approx(sft.check(first)["loss"], abs=1e-6)  # from the first weights again
    run = ours.reward(task("reward")).prepare(1)
    told = run.told(run.work())
    assert told["useful"] == QUICK.pairs and told["efficiency"] > 1.1  # a shared prompt is there once
    assert capsys.readouterr().out.count("reward") == QUICK.pairs // QUICK.pair_batch


@pytest.mark.parametrize("way", ["separate", "shared"])
def test_our_ppo_side(task: Callable[..., Task], way: str) -> None:
    side = ours.ppo_side(task("ppo", way=way))
    told = [run.told(run.work()) for run in (side.prepare(1), side.prepare(2))]
    assert told[0]["useful"] == QUICK.episodes and 0 < told[0]["ended"] <= 1
    assert told[0]["response"] == told[1]["response"] == pytest.approx(QUICK.response[0], rel=0.3)
    assert {"time/sample_fraction", "time/score_fraction", "time/update_fraction"} <= told[0].keys()
    checked = side.check(None)
    assert abs(checked["kl"]) > 1e-4 and checked["policy_loss"] < 0 and checked == side.check(None)


@pytest.mark.parametrize("way", ["padded", "DataCollatorWithFlattening"])
def test_the_peers_batches_keep_texts_apart(task: Callable[..., Task], folder: Path, way: str) -> None:
    """Transformers' loss of a batch as its trainer gets it is ours: padding is not learned, no text sees another."""
    transformers = pytest.importorskip("transformers")
    model = peer._load(folder / "policy", transformers.AutoModelForCausalLM)
    texts = examples(QUICK, 128, 2)[:5]
    batch = peer._collator(WAYS[way])([{"input_ids": ids, "labels": ids} for ids in texts])
    assert batch["input_ids"].shape[0] == (1 if WAYS[way].flat else 5)
    with torch.no_grad():
        loss = float(model(**batch, use_cache=False).loss)  # with a cache, flat texts see each other
        seen = float(model(**batch, use_cache=True).loss)
    right = ours.sft(task("sft")).check(texts)["loss"]
    assert loss == pytest.approx(right, abs=1e-5)
    assert not WAYS[way].flat or abs(seen - right) > TOLERANCE  # which the benchmark would find


def test_ways_sort_and_cut() -> None:
    assert len(ways("sft_best")) == 6 and ways("sft_padded") == ["padded", "padded, in 4"] and ways("reward") == [""]
    assert WAYS["padded, in 4, sorted by length"].sort and not WAYS["padded, in 4"].sort


def test_episodes_end_as_they_say() -> None:
    drawn = episodes(QUICK, 128, 0)
    assert {one.ended for one in drawn} == {True, False}
    assert all((one.response[-1] == EOS) == one.ended for one in drawn)
    assert all(EOS not in one.response[:-1] and PAD not in one.response for one in drawn)


def ours_again(config: TrainingConfig, place: Path, name: str, side: str, way: str = "") -> Task:
    """A peer that is our own side once more."""
    return Task("sft", f"{OURS}:sft", place, config.sizes, 1, way)


def test_both_sides_in_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "task", ours_again)
    monkeypatch.setattr(bench, "peer_versions", lambda: {"trl": "9"})
    out = tmp_path / "sub" / "out.jsonl"
    assert bench.main(TrainingConfig(peer="trl", quick=True, workload=("sft_padded",), out=out)) == 0
    [record] = [json.loads(line) for line in out.read_text().splitlines()]
    mine, theirs = record["ours"], record["peer"]
    assert record["workload"] == "sft_padded" and record["checked"] == {"loss": pytest.approx(0, abs=1e-6)}
    assert record["ratio"] == pytest.approx(min(theirs["seconds"]) / min(mine["seconds"]))
    assert mine["best"] == pytest.approx(mine["useful"] / min(mine["seconds"])) and mine["peak_bytes"] > 2**26
    assert record["versions"]["trl"] == "9" and record["ratio_cpu"] > 0
    assert {"device", "commit", "date", "load", "sizes", "threads", "command", "unit"} <= set(record)
    assert "sft_padded" in capsys.readouterr().out


class Answers:
    """A process that tells given figures."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def run(self, repeat: int) -> dict[str, Any]:
        return {"loss": self.loss}


def test_sides_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    one: Any = Answers(0.7)
    other: Any = Answers(0.7005)
    config = TrainingConfig(peer="trl", quick=True)
    assert bench.compare(config, "reward", one, one, "") == {"loss": 0.0}
    with pytest.raises(Mismatch, match=r"loss is 0\.7, and the peer's 0\.7005"):
        bench.compare(config, "reward", one, other, "")
    with pytest.raises(Mismatch):
        agreement({"kl": float("nan")}, {"kl": float("nan")})


def failing(*args: Any) -> Any:
    raise SideFailed("no memory")


def test_what_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure", failing)
    records = list(bench.compared(TrainingConfig(peer="trl", quick=True, workload=("reward", "ppo_shared"))))
    assert [(one["workload"], one["failed"]) for one in records] == [
        ("reward", "SideFailed: no memory"),
        ("ppo_shared", "SideFailed: no memory"),
    ]


def test_an_error_in_a_side_comes_back_by_name(task: Callable[..., Task]) -> None:
    here, there = Pipe()
    answer(there, task("sft", f"{OURS}:nothing"))
    assert "AttributeError: module" in here.recv() and not here.poll()


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> str:
        raise peer.importlib.metadata.PackageNotFoundError(name)

    (tmp_path / "trl-1.16.0.dist-info").mkdir()
    with pytest.raises(ValueError, match=r"is 1\.16\.0: pip install --no-deps .* trl==1\.12\.0"):
        peer.ppo_version(tmp_path)
    (tmp_path / "trl-1.16.0.dist-info").rename(tmp_path / "trl-1.12.0.dist-info")
    assert peer.ppo_version(tmp_path) == "1.12.0"
    monkeypatch.setattr(peer.importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match="pip install transformers accelerate datasets trl; or --peer none"):
        bench.main(TrainingConfig(peer="trl", quick=True))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"peer": "trl", "workload": ("sft",)}, "workload = 'sft' is not possible; allowed: sft_padded; sft_best; rew"),
        ({"workload": ("reward",)}, "allowed: sft_step; ppo_iteration"),
        ({"peer": "trl", "device": "cuda"}, "device = 'cuda' is not possible"),
        ({"peer": "trl", "shape": "qwen2-1.5b"}, "shape = 'qwen2-1.5b' is not possible"),
        ({"repeats": 0}, "repeats = 0"),
    ],
)
def test_mistakes(flags: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainingConfig(**flags)


def test_flops_by_hand() -> None:
    """A block: queries 4x4, keys and values 4x2 each, out 4x4, and three of 4x6: 120 weights, 240 in both.

    Texts of 2 and 3 tokens see 3 and 6: 9 pairs, of 2 heads of 2 dimensions in 2 layers: 4 * 2 * 2 * 2 * 9 = 288.
    """
    assert block_weights(SMALL) == 240
    assert forward_flops(SMALL, [2, 3], logits=0) == 2 * 240 * 5 + 288
    assert forward_flops(SMALL, [2, 3], logits=4) == 2 * 240 * 5 + 288 + 2 * 4 * 10 * 4
    assert training_flops(SMALL, [2, 3], logits=4) == 3 * 3008
    trained = sum(p.numel() for p in Transformer(SMALL).blocks.parameters() if p.dim() == 2)
    assert block_weights(SMALL) == trained
    # One text of 2 + 1: sampling 1 + scoring 2 with the head, 2 without; then both models forward and backward.
    head, bare = forward_flops(SMALL, [3], 1), forward_flops(SMALL, [3], 0)
    assert alone.iteration_flops(SMALL, [(2, 1)], replace(QUICK, epochs=2)) == 3 * head + 2 * bare + 6 * (head + bare)


def test_utilisation_is_of_the_devices_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak("NVIDIA H200") == 989e12 and peak("NVIDIA A100-SXM4-80GB") == 312e12 and peak("x86_64 CPU") is None
    monkeypatch.setattr(alone, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert alone.utilisation(445.05e12, torch.device("cpu"))["mfu"] == pytest.approx(0.45)


def test_alone_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert bench.main(TrainingConfig(shape="tiny", out=out)) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["workload"] for record in records] == list(ALONE)
    for record in records:
        assert record["tokens_per_second"] > 0 and record["flops_per_second"] > 0
        assert record["mfu"] is None and "no peak is known" in record["note"] and record["peak_bytes"] is None
    split = [value for name, value in records[1].items() if name.startswith("time/")]
    assert len(split) >= 3 and sum(split) == pytest.approx(1, abs=0.01)
    assert "sft_step" in capsys.readouterr().out


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device = 'cuda', but torch finds none"):
        bench.main(TrainingConfig(device="cuda", shape="qwen2-1.5b"))


def test_beside_the_real_peers(tmp_path: Path) -> None:
    """Where they are installed."""
    for name in ("accelerate", "datasets", "trl"):
        pytest.importorskip(name)
    out = tmp_path / "out.jsonl"
    assert bench.main(TrainingConfig(peer="trl", quick=True, workload=("sft_padded", "reward"), out=out)) == 0
    for record in map(json.loads, out.read_text().splitlines()):
        assert record["checked"]["loss"] < 1e-5 and record["ratio"] > 0
        assert 0 < record["peer"]["efficiency"][0] <= 1 <= record["ours"]["efficiency"][0]


def test_padding_by_hand() -> None:
    batch: dict[str, Tensor] = peer._padded(
        [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6], [7, PAD]]
    assert batch["labels"].tolist() == [[5, 6], [7, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
