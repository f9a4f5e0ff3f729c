"""The way through the house: who may import whom, read from every file's syntax, and what an import brings along."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRONT = "src/bylaw"
ROOMS = {
    "constitution": set(),
    "kernels": set(),
    "model": {"kernels"},
    "sl_cai": {"constitution", "model", "kernels"},
    "rlaif": {"constitution", "model", "kernels"},
    "benchmarks": {"constitution", "model", "kernels", "sl_cai", "rlaif", "front door"},
}
ORACLE = "bylaw.benchmarks.village.oracle"
TRUTH = {ORACLE, "bylaw.benchmarks.village.rules", "bylaw.benchmarks.village.evaluate"}


@cache
def modules() -> dict[str, Path]:
    """Every module of bylaw and its file; the links in src/bylaw are not followed, as they lead to the rooms."""
    files = [*(ROOT / FRONT).rglob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    return {module_name(path): path for path in files}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / FRONT if path.is_relative_to(ROOT / FRONT) else ROOT).with_suffix("").parts
    return ".".join(("bylaw", *parts)).removesuffix(".__init__")


@cache
def imports(path: Path) -> set[str]:
    """Every dotted name that a file imports, at its top or inside a function; `from a import b` is a and a.b."""
    return names_in(path.read_text(encoding="utf-8"), module_name(path) if path in modules().values() else "")


def names_in(source: str, module: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def room(name: str) -> str:
    """The room of a module of bylaw, or the front door."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "front door"


def of_bylaw(names: set[str]) -> set[str]:
    return {name for name in names if name in modules()}


def reached(start: str) -> set[str]:
    """All modules of bylaw that come along with one."""
    found, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += of_bylaw(imports(modules()[name]))
    return found


def test_imports_are_read_wherever_they_stand() -> None:
    source = "import bylaw.rlaif.ppo as p\ndef f():\n    from bylaw import kernels\n    from ..model import engine\n"
    assert names_in(source, "bylaw.sl_cai.revise") == {
        "bylaw.rlaif.ppo", "bylaw", "bylaw.kernels", "bylaw.model", "bylaw.model.engine"
    }  # fmt: skip
    assert "bylaw.kernels.attention" in reached("bylaw.rlaif.ppo")
    assert len(modules()) > 40 and {room(name) for name in modules()} == {*ROOMS, "front door"}


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_imports_run_one_way(name: str) -> None:
    allowed = {name, *ROOMS[name]}
    for path in (ROOT / name).rglob("*.py"):
        inside = {imported for imported in imports(path) if imported.split(".")[0] == "bylaw" and imported != "bylaw"}
        wrong = {imported for imported in inside if room(imported) not in allowed}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}; allowed: {allowed}"


def test_rooms_are_imported_by_their_full_names() -> None:
    """`import model` would work in a checkout and nowhere else."""
    for path in [*modules().values(), *(ROOT / "tests").rglob("*.py")]:
        bare = {name for name in imports(path) if name.split(".")[0] in ROOMS}
        assert not bare, f"{path.relative_to(ROOT)} imports {bare}"


def test_only_declared_packages_are_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["report"], *extras["flash"]]
    names = {line.split(">")[0].split(";")[0].strip().replace("-", "_") for line in declared}
    names.add("markupsafe")  # jinja2's own escaping, which always comes with it
    for path in modules().values():
        foreign = {name.split(".")[0] for name in imports(path)} - {"bylaw"} - set(sys.stdlib_module_names)
        if path.name in ("real_prompts.py", "engine_peer.py"):  # Transformers is the other side, where installed
            foreign -= {"transformers"}
        if path.name == "training_peer.py":
            foreign -= {"transformers", "trl", "datasets"}
        if path.parent.name == "operations":  # other packages' kernels to be timed beside ours, where installed
            foreign -= {"flash_attn", "liger_kernel"}
        assert foreign <= names, f"{path.relative_to(ROOT)} imports {foreign - names}"


def test_kernels_is_no_regular_package() -> None:
    """With an __init__.py, a checkout on sys.path would shadow the kernels package that Transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert list((ROOT / "kernels").glob("*.py"))


def test_every_package_is_listed_for_the_wheel() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text())
    listed = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    packages = {".".join(name.split(".")[:-1]) for name, path in modules().items() if path.name != "__init__.py"}
    assert packages | {"bylaw.benchmarks"} == set(ast.literal_eval(listed))
    for name in ROOMS:
        assert (ROOT / FRONT / name).readlink() == Path("../..") / name


def test_nothing_that_trains_knows_the_truth_of_the_village() -> None:
    trains = [name for name in modules() if room(name) not in ("benchmarks", "front door")]
    for name in [*trains, "bylaw.pipeline"]:
        assert not reached(name) & TRUTH, f"{name} reaches {reached(name) & TRUTH}"
    users = {name for name, path in modules().items() if ORACLE in imports(path)}
    assert users == {"bylaw.benchmarks.village.evaluate"}


def run(program: str) -> str:
    # From the checkout, where a bare `import model` would find the folder.
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_everything_leaves_no_bare_room_behind() -> None:
    names = sorted(modules())
    program = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    assert run(f"{program}print(sorted(set(sys.modules) & {set(ROOMS)}))").strip() == "[]"


def test_the_command_line_starts_without_torch() -> None:
    quick = "bylaw.cli, bylaw.constitution.load, bylaw.model.settings, bylaw.sl_cai.config, bylaw.rlaif.config"
    program = f"import sys, {quick}\nprint(sorted(set(sys.modules) & {{'torch', 'transformers', 'tokenizers'}}))"
    assert run(program).strip() == "[]"
