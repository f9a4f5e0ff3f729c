"""The resource check: what it reads off compiled code, what it refuses, and that its table holds every launch."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bylaw.benchmarks import fake_gpu, resources
from bylaw.benchmarks.fake_gpu import TARGETS, Resources
from bylaw.benchmarks.resources import Task

SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E.EF.128 R8, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.64 R8, desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR4][R2.64] ;
        /*0040*/                   UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], !UPT ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0070*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4], tmem[UR6], idesc[UR7], UP0 ;
        /*0080*/                   STL [R1], R4 ;
        /*0090*/                   LDL.LU R4, [R1] ;
        /*00a0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
"""
AMD = """
	buffer_load_dwordx4 v[0:3], v0, s[8:11], 0 offen
	buffer_load_dwordx2 v[0:1], v0, s[8:11], 0 offen
	global_load_dwordx4 v[0:3], v[0:1], off
	buffer_load_dwordx4 v0, s[8:11], 0 offen lds
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	scratch_store_dword off, v0, off
    .private_segment_fixed_size: 12
    .vgpr_count:     34
    .vgpr_spill_count: 5
"""
TASK = Task("op", "V=1", "sm_90", tensor_cores=False)


def test_instructions_are_counted() -> None:
    assert fake_gpu.count_instructions(SASS) == {
        "wgmma": 1,
        "tcgen05": 1,
        "mma.sync": 1,
        "load16": 2,
        "cp.async": 1,
        "tma": 1,
        "local": 2,
    }
    assert fake_gpu.count_instructions(AMD) == {"mfma": 1, "load16": 2, "cp.async": 1, "local": 1}


@pytest.mark.parametrize(("operands", "dot"), [("64x32xbf16", True), ("64x32xf16", True), ("64x32xf32", False)])
def test_resources_of_amd_code(operands: str, dot: bool) -> None:
    ttir = f"%1 = tt.dot %a, %b, %c : tensor<{operands}> * tensor<32x64xbf16> -> tensor<64x64xf32>"
    found = fake_gpu.resources("_kernel", {"amdgcn": AMD, "ttir": ttir}, shared=7)
    assert (found.kernel, found.registers, found.spill, found.shared, found.dot) == ("_kernel", 34, 20, 7, dot)


@pytest.mark.parametrize(
    ("architecture", "kernel", "said"),
    [
        ("sm_90", Resources("k", 255, 0, 232_448), None),
        ("sm_90", Resources("k", 255, 8, 0), "spills 8 bytes"),
        ("sm_100", Resources("k", 255, 8, 0), "spills 8 bytes"),
        ("sm_80", Resources("k", 255, 8, 0), None),
        ("gfx942", Resources("k", 255, 8, 0), None),
        ("sm_90", Resources("k", 1, 0, 232_449), "232449 bytes of shared memory; there are 232448"),
        ("sm_100", Resources("k", 1, 0, 232_449), "there are 232448"),
        ("sm_80", Resources("k", 1, 0, 166_913), "there are 166912"),
        ("sm_89", Resources("k", 1, 0, 65_537), "there are 65536"),
        ("gfx942", Resources("k", 1, 0, 65_537), "there are 65536"),
    ],
)
def test_absolute_rules(architecture: str, kernel: Resources, said: str | None) -> None:
    broken = resources.broken_rules(Task("op", "V=1", architecture, False), [kernel])
    assert (said is None) == (not broken) and all(str(said) in one for one in broken) and len(broken) <= 1


@pytest.mark.parametrize("name", fake_gpu.TENSOR_CORES)
def test_products_have_to_be_on_tensor_cores(name: str) -> None:
    task = Task("op", "V=1", "sm_90", tensor_cores=True)
    on, off = (Resources("k", 1, 0, 0, True, counts) for counts in ({name: 1}, {"load16": 4}))
    other = Resources("merge", 1, 0, 0)
    assert resources.broken_rules(task, [on, other]) == []
    (said,) = resources.broken_rules(task, [on, off])
    assert "miss the tensor cores" in said
    (said,) = resources.broken_rules(task, [other])
    assert "no 16-bit product" in said
    assert resources.broken_rules(TASK, [off]) == []


def test_a_launch_that_does_not_compile() -> None:
    (said,) = resources.broken_rules(TASK, "CompilationError: at 3:1")
    assert said == "op | V=1 | (all) | sm_90: does not compile: CompilationError: at 3:1"


def test_changes() -> None:
    before = {"registers": 40, "spill": 0, "shared": 16, "load16": 2, "wgmma": 4, "local": 3}
    key = TASK.key("k")
    assert resources.changes({key: before}, {key: before}) == []
    better = {"registers": 39, "spill": 0, "shared": 0, "load16": 1, "wgmma": 9}
    assert resources.changes({key: better}, {key: before}) == []
    for name, amount in (("registers", 41), ("spill", 4), ("shared", 17)):
        (said,) = resources.changes({key: {**before, name: amount}}, {key: before})
        assert said == f"{key}: {name} {before[name]} -> {amount}"
    (said,) = resources.changes({key: {**better, "load16": 0} | {"tma": 1}} | {}, {key: {**before, "cp.async": 1}})
    assert said == f"{key}: no cp.async any more"
    assert "not in the table" in resources.changes({key: before}, {})[0]
    assert "only in the table" in resources.changes({}, {key: before})[0]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_gpu, "INTERPRETED", True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 is set"):
        resources.main(resources.Config())
    monkeypatch.setattr(fake_gpu, "INTERPRETED", False)
    with pytest.raises(ValueError, match="no such architecture: 'sm_10'; allowed: sm_80, "):
        resources.main(resources.Config(arch=("sm_10",)))
    with pytest.raises(ValueError, match="no such operation: 'nothing'"):
        resources.main(resources.Config(op=("nothing",)))


def test_the_table_holds_every_launch() -> None:
    """And nothing else. That the figures are right, CI sees: `python benchmarks/resources.py --quick --check`."""
    table = resources.read_table()["kernels"]
    launches = {(task.operation, task.launch, task.architecture) for task in resources.tasks((), tuple(TARGETS))}
    in_table = {(parts[0], parts[1], parts[3]) for parts in (key.split(" | ") for key in table)}
    assert launches == in_table


def test_the_table_is_written_and_compared_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "swiglu | I=14336 | _forward_kernel | sm_90"
    row, other = {"registers": 30, "spill": 0, "shared": 0}, {"rope | a | k | sm_90": {"registers": 1}}
    complaints: list[str] = []
    table = tmp_path / "table.json"
    monkeypatch.setattr(resources, "TABLE", table)
    monkeypatch.setattr(resources, "require_compiler", lambda: None)
    monkeypatch.setattr(resources, "compile_all", lambda todo, jobs: ({key: row}, list(complaints)))
    config = resources.Config(op=("swiglu",), arch=("sm_90",), check=True)
    assert resources.main(config) == 1 and resources.main(replace(config, check=False)) == 0  # there is no table yet
    assert resources.main(replace(config, write=True)) == resources.main(config) == 0
    held = json.loads(table.read_text())
    assert held == {"versions": resources.versions(), "kernels": {key: row}}

    complaints.append("spills")
    assert resources.main(config) == resources.main(replace(config, write=True)) == 1  # writing excuses no spill
    complaints.clear()
    held["kernels"] = {key: {**row, "registers": 29}, **other}
    table.write_text(json.dumps(held))
    assert resources.main(config) == 1 and f"FAILED {key}: registers 29 -> 30" in capsys.readouterr().out
    assert resources.main(replace(config, write=True)) == 0
    assert json.loads(table.read_text())["kernels"] == {key: row, **other}

    held["versions"]["triton"] = "0"
    table.write_text(json.dumps(held))
    assert resources.main(config) == 0 and "growth was not compared" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not a part"):
        resources.main(replace(config, write=True))


def test_compiling_without_a_gpu() -> None:
    command = [sys.executable, "-m", "bylaw.benchmarks.resources", "--op", "swiglu", "--arch", "sm_90", "gfx942"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*command, "--check", "--jobs", "1"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines() if line.startswith("swiglu")}
    for kernel in ("_forward_kernel", "_backward_kernel"):
        assert "load16" in found[f"swiglu | I=14336 | {kernel} | sm_90"]
        amd = found[f"swiglu | I=14336 | {kernel} | gfx942"]
        assert int(amd[amd.index("registers") + 1]) > 10
