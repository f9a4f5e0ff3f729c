"""`bylaw kernels`: every operation is explained, and what is said is what runs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bylaw import explain as module
from bylaw.cli import main
from bylaw.explain import explain
from bylaw.kernels.attention_library import LIBRARIES, Library
from bylaw.kernels.backend import OPERATIONS, choose

ROOT = Path(__file__).parents[1]


def test_every_operation_has_its_file_and_its_benchmark() -> None:
    for operation in OPERATIONS:
        assert (ROOT / "kernels" / f"{operation}.py").exists(), operation
        assert (ROOT / "benchmarks" / "operations" / f"{operation}.py").exists(), operation


def test_on_a_cpu_every_operation_is_torch(capsys: pytest.CaptureFixture[str]) -> None:
    text = explain(torch.device("cpu"))
    for operation in OPERATIONS:
        assert re.search(rf"^{operation} +reference because", text, re.M)
        assert choose(operation, "auto", torch.zeros(1)) == "reference"
    if not torch.cuda.is_available():
        main(["kernels"])
        assert capsys.readouterr().out.strip() == text
    assert torch.__version__ in text


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ("sm_90", "launch settings of sm_90"),
        ("sm_103", "no launch settings of its own for sm_103, it takes those of sm_100"),
        ("sm_120", "no launch settings of its own for sm_120, it takes those of small"),
    ],
)
def test_on_a_gpu_it_says_whose_settings_are_taken(here: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bylaw.kernels.launch.architecture", lambda device: here)
    monkeypatch.setattr(module, "architecture", lambda device: here)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    found: list[Library | None] = [None, replace(LIBRARIES[0], name="flash-attn 9")]
    for library in found:
        monkeypatch.setattr(module, "library", lambda *asked, library=library: (library, "so it is"))
        text = explain(torch.device("cuda"))
        assert text.startswith(f"a GPU ({here}), torch")
        assert len(re.findall(rf"triton because .*{said}$", text, re.M)) == len(OPERATIONS) - (library is not None)
        wanted = "library (flash-attn 9) because so it is" if library else f"triton because so it is; {said}"
        assert re.search(rf"^attention +{re.escape(wanted)}$", text, re.M)
