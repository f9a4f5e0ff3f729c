"""Which library's attention is taken, why, and what it is called with. None of them is run: that takes a GPU."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from precision import compiled
from torch import Tensor

from bylaw.kernels import attention_library
from bylaw.kernels.attention import attention, plan
from bylaw.kernels.attention_library import LIBRARIES, Library, call, library, load
from bylaw.kernels.layout import Layout

GPU = torch.device("cuda")
FLASH_4, FLASH_3, FLASH_2, VARLEN = "flash_attn.cute", "flash_attn_interface", "flash_attn", "torch.nn.attention.varlen"
Calls = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def decided_anew() -> Iterator[None]:
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Pretends a GPU of some compute capability with these modules; returns what their functions are called with."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    def pretend(major: int, *names: str, pair: bool = False) -> Calls:
        calls: Calls = []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        for name in (FLASH_4, FLASH_3, "flash_attn_3.flash_attn_interface", FLASH_2, VARLEN):
            monkeypatch.setitem(sys.modules, name, fake(calls, pair) if name in names else None)
        return calls

    return pretend


def fake(calls: Calls, pair: bool) -> ModuleType:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, window_size=(-1, -1),
        deterministic=False,
    ) -> Any:  # fmt: skip
        calls.append({name: value for name, value in locals().items() if name not in ("calls", "pair")})
        return (q + 1, q) if pair else q + 1

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False) -> Any:
        calls.append({name: value for name, value in locals().items() if name != "calls"})
        return q + 2

    made: Any = ModuleType("fake")
    made.flash_attn_varlen_func, made.varlen_attn = flash_attn_varlen_func, varlen_attn
    return made


def chosen(head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> str | None:
    found, _ = library(GPU, dtype, head_dim)
    return found and found.name


def packed(kv_heads: int = 1) -> tuple[Tensor, Tensor, Tensor, Layout]:
    return torch.zeros(5, 2, 8), torch.zeros(5, kv_heads, 8), torch.zeros(5, kv_heads, 8), plan(torch.tensor([0, 2, 5]))


@pytest.mark.parametrize(
    ("major", "head_dim", "order"),
    [
        (8, 128, ["flash-attn 2", "torch.nn.attention.varlen"]),
        (8, 256, ["flash-attn 2", "torch.nn.attention.varlen"]),
        (8, 100, ["flash-attn 2"]),
        (9, 128, ["flash-attn 4", "flash-attn 3", "flash-attn 2", "torch.nn.attention.varlen"]),
        (9, 256, ["flash-attn 4", "flash-attn 2", "torch.nn.attention.varlen"]),
        (10, 128, ["flash-attn 4", "torch.nn.attention.varlen"]),
        (10, 192, ["torch.nn.attention.varlen"]),
        (10, 256, ["flash-attn 4", "torch.nn.attention.varlen"]),
        (12, 64, ["torch.nn.attention.varlen"]),
        (9, 264, []),
        (7, 64, []),
    ],
)
def test_the_best_that_serves_the_device_is_taken(install: Any, major: int, head_dim: int, order: list[str]) -> None:
    there = {"flash-attn 4": FLASH_4, "flash-attn 3": FLASH_3, "flash-attn 2": FLASH_2, VARLEN: VARLEN}
    for expected in [*order, None]:
        load.cache_clear()
        install(major, *there.values())
        assert chosen(head_dim) == expected
        there.pop(expected or "", None)


def test_the_reasons(install: Any) -> None:
    install(10, VARLEN)
    assert library(GPU, torch.float16, 128)[1] == (
        "flash-attn 4 is not installed; flash-attn 3 serves heads of a multiple of 8 to 192 on Hopper; flash-attn 2 "
        "serves heads to 256 on Ampere, Ada and Hopper; torch.nn.attention.varlen is there and serves both passes"
    )
    assert library(torch.device("cpu"), torch.float16, 128) == (None, "libraries run on CUDA devices only")
    assert library(GPU, torch.float32, 128) == (None, "no library takes torch.float32")


def test_a_broken_library_says_what_is_wrong(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was built for another torch fails with anything while it loads."""
    install(8, VARLEN)
    import_module = attention_library.importlib.import_module

    def broken(name: str) -> ModuleType:
        if name == FLASH_2:
            raise ImportError("undefined symbol:\n _ZN3c10")
        return import_module(name)

    monkeypatch.setattr(attention_library.importlib, "import_module", broken)
    found, why = library(GPU, torch.float16, 128)
    assert found is not None and found.name == VARLEN
    assert "flash-attn 2 cannot be imported (flash_attn: undefined symbol: _ZN3c10)" in why


def test_none_on_amd(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(9, FLASH_2)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert library(GPU, torch.bfloat16, 128) == (None, "no library was tried on AMD")


def test_what_is_too_old_or_not_built_is_passed_over(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(8, FLASH_2, VARLEN)
    old: Any = ModuleType("old")
    old.flash_attn_varlen_func = lambda q, k, v, causal=False, window_size=(-1, -1): q
    old.varlen_attn = lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: query
    monkeypatch.setitem(sys.modules, FLASH_2, old)
    assert chosen() == "torch.nn.attention.varlen"
    monkeypatch.setitem(sys.modules, VARLEN, old)
    load.cache_clear()
    assert chosen() is None and "no grouped queries" in library(GPU, torch.float16, 128)[1]
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    load.cache_clear()
    assert chosen() is None and "not in this build" in library(GPU, torch.float16, 128)[1]


@pytest.mark.parametrize(("name", "none"), [(FLASH_4, None), (FLASH_3, -1), (FLASH_2, -1)])
@pytest.mark.parametrize("pair", [False, True])
def test_what_flash_attn_is_called_with(install: Any, name: str, none: int | None, pair: bool) -> None:
    calls = install(9, name, pair=pair)
    found, _ = library(GPU, torch.bfloat16, 128)
    q, k, v, layout = packed()
    assert found is not None
    for window, size in ((0, (none, none)), (3, (2, 0))):
        assert torch.equal(call(found.name, q, k, v, layout.cu_seqlens, layout.max_seqlen, window), q + 1)
        assert calls.pop() == {
            "q": q, "k": k, "v": v, "cu_seqlens_q": layout.cu_seqlens, "cu_seqlens_k": layout.cu_seqlens,
            "max_seqlen_q": 3, "max_seqlen_k": 3, "causal": True, "window_size": size, "deterministic": True,
        }  # fmt: skip


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_what_torch_is_called_with(install: Any, kv_heads: int) -> None:
    calls = install(12, VARLEN)
    found, _ = library(GPU, torch.bfloat16, 128)
    q, k, v, layout = packed(kv_heads)
    assert found is not None
    for window, size in ((0, (-1, 0)), (3, (2, 0))):
        assert torch.equal(call(found.name, q, k, v, layout.cu_seqlens, layout.max_seqlen, window), q + 2)
        assert calls.pop() == {
            "q": q, "k": k, "v": v, "cu_seq_q": layout.cu_seqlens, "cu_seq_k": layout.cu_seqlens, "max_q": 3,
            "max_k": 3, "window_size": size, "enable_gqa": kv_heads == 1,
        }  # fmt: skip


def test_attention_hands_over_also_under_torch_compile(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(9, FLASH_2)

    @torch.compiler.assume_constant_result
    def here(*like: object) -> tuple[Library, str]:
        return LIBRARIES[2], "of a test"

    monkeypatch.setattr(attention_library, "library", here)
    q, k, v, layout = packed()
    for function in (attention, compiled(attention)):
        assert torch.equal(function(q, k, v, layout, 2, backend="library"), q + 1)
        assert calls.pop()["max_seqlen_k"] == 3
    assert attention(q, k, v, layout).abs().max() == 0, "a CPU's own choice stays the reference"
