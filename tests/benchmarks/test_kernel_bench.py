"""The bench measures its own cases: what is right is timed, what is wrong is refused, and the figures add up."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bylaw.benchmarks import gate, kernels, timing
from bylaw.benchmarks.case import Case, Floor
from bylaw.benchmarks.script import modules
from bylaw.benchmarks.timing import Rates

CPU = torch.device("cpu")
RATES = Rates(copy=1e9, matmul=1e12)
Operation = Callable[..., Tensor]


def double(x: Tensor, backend: str = "auto") -> Tensor:
    return 2 * x


def a_case(ours: Operation = double, size: int = 8, **others: Any) -> Case:
    return Case(
        operation="double",
        shape={"N": size},
        inputs=lambda device, dtype: {"x": torch.randn(size, device=device, dtype=dtype)},
        ours=ours,
        **{"forward": Floor(bytes=2e6), "backward": Floor(bytes=1e6, flops=4e9), "differentiable": ("x",)} | others,
    )


def a_module(*cases: Case) -> ModuleType:
    module = ModuleType("double")
    vars(module)["cases"] = lambda small: iter(cases)
    return module


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
    """Run the program on these cases alone; gives its exit status and its records."""

    def run(*cases: Case, **flags: Any) -> tuple[int, list[dict[str, Any]]]:
        monkeypatch.setattr(kernels, "modules", lambda names: {"double": a_module(*cases)})
        monkeypatch.setattr(kernels, "rates", lambda device, seconds: RATES)
        flags = {"device": "cpu", "seconds": 0.001, "out": tmp_path / "sub" / "out.jsonl", **flags}
        status = kernels.main(kernels.Config(**flags))
        return status, [json.loads(line) for line in flags["out"].read_text().splitlines()]

    return run


def test_records(bench: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    status, (first, *records) = bench(a_case())
    assert status == 0 and first["copy_bytes_per_second"] == 1e9 and first["flops_per_second"] == 1e12
    assert [record["pass"] for record in records] == ["forward", "backward", "both"]
    assert [record["floor_ms"] for record in records] == pytest.approx([2, 4, 6])  # the longer of 1 and 4, then both
    assert [record["floor_kind"] for record in records] == ["bytes", "flops", "flops"]
    for record in records:
        assert record["operation"] == "double" and record["implementation"] == "reference"
        assert record["shape"] == {"N": 8} and record["checked_at"] == [{"N": 8}] and record["dtype"] == "bfloat16"
        assert record["ms"]["p20"] <= record["ms"]["p50"] <= record["ms"]["p80"]
        assert record["percent_of_floor"] == pytest.approx(100 * record["floor_ms"] / record["ms"]["p50"])
        assert record["error"] == 0 and record["peak_bytes"] is None and record["result_bytes"] == 16
        assert record["versions"]["torch"] and "commit" in record and record["device"]
    assert capsys.readouterr().out.count("double ") == 3
    assert len(bench(a_case())[1]) == 8  # the second run is appended


def test_an_operation_without_gradient_has_one_pass(bench: Callable[..., Any]) -> None:
    seen = []

    def ours(x: Tensor, backend: str = "auto") -> Tensor:
        seen.append(torch.is_grad_enabled())
        return 2 * x

    status, (_, *records) = bench(a_case(ours, differentiable=(), backward=None))
    assert status == 0 and [record["pass"] for record in records] == ["forward"] and not seen[-1]


@pytest.mark.parametrize("factor", [0.97, float("nan")])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_wrong_result_is_not_timed(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, factor: float, where: str
) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x * (factor if where == "forward" else 1)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0] * (factor if where == "backward" else 1)

    def ours(x: Tensor, backend: str) -> Any:
        return Wrong.apply(x) if backend == "triton" else 2 * x

    monkeypatch.setattr(kernels.Bench, "ours", "triton")
    status, (_, *records) = bench(a_case(ours), a_case())
    assert status == 1
    assert "against float64" in records[0]["failed"] and "ms" not in records[0]
    assert [record["pass"] for record in records[1:]] == ["forward", "backward", "both"]


def test_peers(bench: Callable[..., Any]) -> None:
    def rough(x: Tensor) -> Tensor:
        return 2.1 * x

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no such\nkernel")

    peers = {"rough": rough, "broken": broken, "other shape": lambda x: 2 * x[1:]}
    assert len(bench(a_case(peers=peers))[1]) == 4
    status, records = bench(a_case(peers=peers), peers=True)
    assert status == 0  # a peer that fails is reported; the exit status is about ours
    found = {name: [r for r in records[4:] if r.get("implementation") == name] for name in ("reference", *peers)}
    assert len(found["reference"]) == len(found["rough"]) == 3
    assert found["rough"][0]["error"] == pytest.approx(0.05, rel=0.1) and found["rough"][0]["error_ratio"] > 2
    assert [record["failed"] for record in found["broken"]] == ["no such kernel"]
    assert "shape" in found["other shape"][0]["failed"] and len(found["other shape"]) == 1


def test_where_float64_does_not_fit(bench: Callable[..., Any]) -> None:
    def ours(x: Tensor, backend: str) -> Tensor:
        if x.dtype == torch.float64 and x.numel() > 8:
            raise torch.OutOfMemoryError
        return 2 * x

    status, records = bench(a_case(ours, 16))
    assert status == 1 and "OutOfMemory" in records[1]["failed"]
    assert bench(a_case(ours, 16, check=a_case(ours, 4)))[1][3]["checked_at"] == [{"N": 4}]
    rough, exact = {"peer": lambda x: 2.1 * x}, {"peer": lambda x: 2 * x, "only here": lambda x: 2 * x}
    small = [a_case(ours, 3, peers=rough), a_case(ours, 5, peers=exact), replace(a_case(ours, 4), operation="other")]
    found, shapes = kernels.check_where_it_fits(a_case(ours, 16), small, kernels.Bench(CPU, RATES, 0.001, peers=True))
    assert shapes == [{"N": 3}, {"N": 5}] and found.keys() == {"reference", "peer", "only here"}
    assert isinstance(found["peer"], gate.Errors) and not found["peer"].as_good
    assert isinstance(found["reference"], gate.Errors) and found["reference"].as_good


def test_a_peer_without_a_check_is_timed_and_says_so(bench: Callable[..., Any]) -> None:
    case = a_case(peers={"peer": lambda x: 2 * x}, check=a_case(size=4))
    status, (_, *records) = bench(case, peers=True)
    assert status == 0 and [record["error"] for record in records] == [0] * 3 + [None] * 3


def test_inputs_are_fresh_where_they_are_changed_in_place(bench: Callable[..., Any]) -> None:
    def ours(x: Tensor, backend: str) -> Tensor:
        return x.mul_(2)

    status, records = bench(a_case(ours, differentiable=(), backward=None))
    assert status == 0 and records[1]["error"] == 0


def test_copies_of_inputs() -> None:
    qkv = torch.randn(3, 4, 2)
    given = {"q": qkv[:, 1:3], "wide": torch.ones(2).expand(3, 2), "ids": [torch.arange(2)], "scale": 0.5}
    copies = gate.ready(given, ("q",), torch.float64)
    assert copies["q"].stride() == (8, 2, 1) and torch.equal(copies["q"], given["q"].double())
    assert copies["q"].requires_grad and copies["q"].is_leaf and not given["q"].requires_grad
    assert copies["wide"].dtype == torch.float64 and copies["ids"][0].dtype == torch.int64 and copies["scale"] == 0.5
    assert copies["ids"][0] is not given["ids"][0]
    assert gate.dtypes({**given, "half": (torch.ones(1).half(),)}) == ["float32", "float16"]


def test_errors_by_hand() -> None:
    exact = torch.tensor([4.0, -8.0, float("inf")], dtype=torch.float64)
    ours, torchs = exact.float() + torch.tensor([0.4, 0, 0]), exact.float() + torch.tensor([0, 0.1, 0])
    errors = gate.compare([ours], [torchs], [exact])
    assert errors.error == pytest.approx(0.05) and errors.torch_error == pytest.approx(0.0125, rel=1e-4)
    assert (
        errors.ratio == pytest.approx(4, rel=1e-4) and errors.difference == pytest.approx(0.05) and not errors.as_good
    )
    rounded = gate.compare([exact.float() * (1 + 1e-7)], [exact.float()], [exact])
    assert rounded.as_good and rounded.torch_error == 0  # one rounding is allowed where torch makes no error
    tokens, other = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])
    assert gate.compare([other], [tokens], [tokens]).error == 0.25
    assert not gate.compare([other], [tokens], [tokens]).as_good
    nan = torch.full((3,), float("nan"))
    assert not gate.compare([exact.float(), nan], [exact.float(), exact.float()], [exact, exact]).as_good
    with pytest.raises(ValueError, match="shape"):
        gate.compare([exact[:2]], [torchs], [exact])
    with pytest.raises(ValueError, match="2 tensors; allowed: 1"):
        gate.compare([exact, exact], [torchs], [exact])


def test_percentiles_are_of_single_calls() -> None:
    slow = iter(range(10**6))
    times = timing.measure(lambda: time.sleep(0.01 if next(slow) % 2 else 0), CPU, 0.1)
    assert times.p20 < 5 < 10 <= times.p80
    assert timing.peak_bytes(lambda: None, CPU) is None


def test_on_a_gpu_the_cache_is_cold_and_the_devices_clock_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("clock")

        def elapsed_time(self, end: Any) -> float:
            return 7.0

    class Scrub:
        def zero_(self) -> None:
            happened.append("scrub")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("wait"))
    monkeypatch.setattr(timing.torch, "empty", lambda *args, **kwargs: Scrub())
    times = timing._cuda_times(lambda: happened.append("call"), torch.device("cuda"), 2)
    assert times == [7.0, 7.0]
    assert happened == ["call", *["scrub", "clock", "call", "clock"] * 2, "wait"]


def test_rates_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure", lambda call, device, seconds: timing.Times(1.0, 2.0, 3.0))
    found = timing.rates(CPU, 0.01)
    assert found.copy == pytest.approx(2 * 2**25 / 0.002) and found.matmul == pytest.approx(2 * 256**3 / 0.002)


def test_plot(bench: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an optional dependency")
    bench(a_case(), plot=tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="no measurement"):
        kernels.plotter()(tmp_path / "none.jsonl", tmp_path / "none.png")


def test_refusals(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device = 'cuda'"):
        bench(a_case(), device="cuda")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bylaw.benchmarks.plot", raising=False)
    with pytest.raises(ValueError, match=r"needs matplotlib.*bylaw\[report\]"):
        bench(a_case(), plot=tmp_path / "out.png")
    with pytest.raises(ValueError, match="no such operation: 'nothing'; allowed: "):
        modules(["nothing"])


@pytest.mark.parametrize("name", modules())
def test_the_cases_of_every_operation(name: str) -> None:
    """Their references run in float64 and bfloat16, and give as many gradients as they promise."""
    (module,) = modules([name]).values()
    small, large = list(module.cases(small=True)), list(module.cases(small=False))
    assert small and large
    for case in small:
        errors = gate.check(case, {"ours": partial(case.ours, backend="reference")}, CPU, torch.bfloat16)["ours"]
        assert isinstance(errors, gate.Errors) and errors.as_good, errors
        assert case.forward.bytes > 0 and (case.backward is None or case.differentiable)
