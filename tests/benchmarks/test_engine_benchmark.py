"""The engine's bench times what is right, refuses what is wrong, and counts what was asked for."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bylaw.benchmarks import engine as bench
from bylaw.benchmarks.engine_check import Mismatch, compare
from bylaw.benchmarks.engine_config import BY_HAND, NAMES, QUICK, EngineConfig, Sizes
from bylaw.benchmarks.engine_models import SHAPES
from bylaw.benchmarks.engine_peer import Peer
from bylaw.benchmarks.engine_workloads import draw
from bylaw.benchmarks.timing import Rates
from bylaw.cli import main as bylaw
from bylaw.model.checkpoint import save_model
from bylaw.model.engine import Completion, Engine, Request
from bylaw.model.transformer import Transformer, initialize

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the bench in small; gives its exit status and its records."""

    def bench_in_small(**flags: Any) -> tuple[int, list[dict[str, Any]]]:
        out = tmp_path / "sub" / "out.jsonl"
        status = bench.main(EngineConfig(quick=True, out=out, **flags))
        return status, [json.loads(line) for line in out.read_text().splitlines()]

    return bench_in_small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a person's own, with a context too short for the workloads as they are."""
    config = replace(SHAPES["tiny"], max_position_embeddings=58, eos_token_ids=(7,))
    save_model(initialize(Transformer(config), 1), tmp_path / "own")
    return tmp_path / "own"


def test_every_workload_has_its_ratio(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    status, (first, *records) = run()
    assert status == 0
    assert first["check"] == "greedy text" and first["agreement"]["items"] == 10
    assert [record["workload"] for record in records] == [*NAMES, *BY_HAND]
    told = capsys.readouterr().out
    for record in records:
        assert record["ratio"] == pytest.approx(min(record["peer"]["seconds"]) / min(record["ours"]["seconds"]))
        assert record["ours"]["best"] == pytest.approx(record["useful"] / min(record["ours"]["seconds"]))
        assert record["ratio_median"] > 0 and record["ours"]["median"] <= record["ours"]["best"]
        assert record["agreement"]["items"] and record["peer_way"] in record["peer_ways"]
        assert {"device", "commit", "date", "load", "sizes", "dtype", "threads", "command"} <= set(record)
        assert record["versions"]["transformers"] and record["workload"] in told
    assert [record["unit"] for record in records[:5]] == ["tokens", "tokens", "tokens", "chains", "labels"]


def test_program(tmp_path: Path) -> None:
    """As a person runs it: its folder, which has a kernels.py, must not come before the packages."""
    flags = ["--peer", "transformers", "--quick", "--workload", "equal", "--out", str(tmp_path / "out.jsonl")]
    program = [sys.executable, "benchmarks/engine.py", *flags]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[-1])
    assert record["workload"] == "equal" and record["ratio"] > 0 and "--quick" in record["command"]


def test_a_peer_with_other_text_stops_everything(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Peer._continue
    monkeypatch.setattr(Peer, "_continue", lambda self, prompts, new: (right(self, prompts, new) + 1) % 256)
    status, records = run()
    assert status == 1 and len(records) == 1 and "gap" in records[0]["failed"]


def test_wrong_workload_is_not_timed_and_the_others_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Engine.score

    def wrong(engine: Engine, queries: Any) -> Any:
        return [[score + 0.01 for score in scores] for scores in right(engine, queries)]

    monkeypatch.setattr(Engine, "score", wrong)
    status, (_, equal, labels) = run(workload=("equal", "labels"))
    assert status == 1 and "ratio" in equal
    assert "ratio" not in labels and "ours" not in labels and "Mismatch: query 0" in labels["failed"]


def test_way_that_fails_leaves_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Peer._continue

    def without_static(peer: Peer, *args: Any) -> Tensor:
        if peer.way.cache == "static":
            raise RuntimeError("no static cache here")
        return right(peer, *args)

    monkeypatch.setattr(Peer, "_continue", without_static)
    status, (_, record) = run(workload=("equal",))
    assert status == 0 and record["peer_way"].startswith("dynamic")
    assert "no static cache here" in record["peer_ways"]["static cache, batches of 64"]


def test_without_a_peer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install transformers, or --peer none"):
        run()
    status, records = run(peer="none")
    assert status == 0 and [record["workload"] for record in records] == list(NAMES)
    assert all("ratio" not in record and record["ours"]["best"] > 0 for record in records)


def test_own_checkpoint_by_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its end-of-text token stops neither side, and the examples are cut to its context."""
    with pytest.raises(SystemExit) as end:
        bylaw(["bench", "engine", str(folder), "--quick", "--workload", "varied", "chains"])
    told = capsys.readouterr().out
    assert end.value.code == 0 and str(folder) in told and "chains" in told


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "allowed: bylaw bench engine FOLDER"),
        (["engine"], "a folder is wanted first, before any flag: bylaw bench engine FOLDER"),
        (["engine", "nowhere"], "nowhere: no such folder"),
        (["engine", "nowhere", "--device", "cuda"], "device = 'cuda', but torch finds none"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        bylaw(["bench", *args])
    told = capsys.readouterr().err
    assert end.value.code == 2 and said in told and told.count("\n") == 1


def test_sizes_within_a_context(folder: Path) -> None:
    assert QUICK.within(4096) == QUICK
    cut = QUICK.within(50)
    assert max(cut.longest().values()) == 50 and cut.shots < QUICK.shots and cut.said == QUICK.said
    with pytest.raises(ValueError, match=r"context of 58 tokens is too short; the workloads want at least \d+"):
        bench.main(EngineConfig(model=folder, peer="none"))


def test_unknown_workload_is_named() -> None:
    with pytest.raises(ValueError, match=r"workload = 'equla' is not possible; allowed: equal; varied; prefix"):
        EngineConfig(workload=("equla",))
    with pytest.raises(ValueError, match="workload = 'decode at 2k context'"):
        EngineConfig(workload=("decode at 2k context",))
    assert "decode at 2k context" in EngineConfig(device="cuda").chosen


def test_workloads_are_what_the_issue_asks_for() -> None:
    sizes = Sizes()
    work = {name: draw(name, sizes, 8192, 0) for name in NAMES}
    assert {(len(r.prompt), r.max_tokens) for r in work["equal"].requests} == {(64, 64)}
    lengths = [(len(r.prompt), r.max_tokens) for r in work["varied"].requests]
    assert {min(column) for column in zip(*lengths, strict=True)} == {8}
    assert {max(column) for column in zip(*lengths, strict=True)} == {128}
    assert work["varied"].useful == sum(new for _, new in lengths)
    prompts = [list(r.prompt) for r in work["prefix"].requests]
    assert len({tuple(p[:1024]) for p in prompts}) == 1 and len({tuple(p[1024:]) for p in prompts}) == 64
    assert {len(p) for p in prompts} == {1088} and work["prefix"].useful == 64 * 64
    labels = work["labels"]
    assert labels.useful == len(labels.queries) == 2 * 16 * sizes.pairs
    assert len({tuple(q.prompt[: labels.shared]) for q in labels.queries}) == sizes.pairs
    assert all(sorted(a.prompt) == sorted(b.prompt) for a, b in zip(*[iter(labels.queries)] * 2, strict=True))


def test_same_seed_same_text() -> None:
    assert draw("prefix", QUICK, 256, 1) == draw("prefix", QUICK, 256, 1) != draw("prefix", QUICK, 256, 2)


def test_chain_sees_the_answer_of_the_round_before() -> None:
    """A side that answers with ever new tokens shows what each prompt holds."""
    work = draw("chains", QUICK, 256, 0)
    script, said = work.scripts[0](), []
    request, number = next(script), 1000
    turns: list[Any] = []
    while not turns:
        assert isinstance(request, Request)
        said.append((list(request.prompt), [*range(number, number + request.max_tokens)]))
        number += request.max_tokens
        try:
            request = script.send(Completion(ids=said[-1][1], logprobs=[], finish="length"))
        except StopIteration as end:
            turns = end.value
    assert turns == said and len(said) == 1 + 2 * QUICK.rounds
    (question, answer), (critique_prompt, critique), (revision_prompt, revision), (next_prompt, _), _ = said
    opening = [*critique_prompt[: QUICK.shots], *question]
    assert critique_prompt[:-4] == [*opening, *answer]
    assert revision_prompt[:-4] == [*critique_prompt, *critique]
    assert next_prompt[:-4] == [*opening, *revision]


LOGITS = torch.tensor([0.0, 2.0, 1.9995, 1.0])


@pytest.mark.parametrize(("other", "fine"), [(2, True), (3, False)])
def test_text_may_part_where_two_tokens_are_equally_likely(other: int, fine: bool) -> None:
    seen: list[Any] = []
    ours, theirs = [[([5], [1, 1, 0])]], [[([5], [1, other, 3])]]

    def one_comparison() -> Any:
        return compare(ours, theirs, lambda ids: seen.append(ids) or LOGITS, 1e-3)

    if fine:
        agreement = one_comparison()
        assert (agreement.same, agreement.items) == (0, 1) and agreement.gap == pytest.approx(5e-4, rel=1e-2)
    else:
        with pytest.raises(Mismatch, match="token 1 is 1, the peer's 3; gap 1"):
            one_comparison()
    assert seen == [[5, 1]]  # the text up to where they part


def test_other_lengths_are_no_tie() -> None:
    with pytest.raises(Mismatch, match="3 tokens, and the peer's 2"):
        compare([[([5], [1, 1, 0])]], [[([5], [1, 1])]], lambda ids: LOGITS, 1e-3)
    with pytest.raises(Mismatch, match="query 1"):
        compare([[0.0], [float("nan")]], [[0.0], [0.0]], lambda ids: LOGITS, 1e-3)


def test_floor_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 256 by 32, two layers of 9,280 weights with 16 cached keys and values each, and one norm."""
    monkeypatch.setattr(bench, "rates", lambda device, seconds: Rates(copy=1e6, matmul=1.0))
    model = Transformer(SHAPES["tiny"])
    work = draw("equal", replace(QUICK, requests=2, prompt=3, new=3), 256, 0)
    found = bench.decode_floor(bench.Bench(EngineConfig(), QUICK, model, None), work, seconds=2.0)
    weights = 256 * 32 + sum(p.numel() for p in model.blocks.parameters()) + 32
    read = 2 * weights + 2 * (4 + 5) * 2 * 2 * 16  # two steps after the prompt's; each sees its own token too
    assert found["percent_of_floor"] == pytest.approx(100 * (4 * read / 1e6) / 2.0)
