"""`bylaw demo` leaves alone what is not its own. That it works is what the README's first command shows."""

from pathlib import Path

import pytest

from bylaw.cli import main
from bylaw.demo import village_recipe, write_village_prompts
from bylaw.lock import only_one
from bylaw.model.data import read_prompts
from bylaw.recipe import DemoConfig


def test_the_villages_prompts_are_written_once(tmp_path: Path) -> None:
    recipe = village_recipe(DemoConfig(out=tmp_path))
    write_village_prompts(recipe)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    write_village_prompts(recipe)
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert [len(read_prompts(path)) for path in (recipe.prompts, recipe.helpful)] == [660, 1257]


@pytest.mark.parametrize(
    ("name", "said"), [("benign.jsonl", "is none of the village's files"), ("recipe.toml", "is another run")]
)
def test_what_is_not_the_villages_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path)])
    assert said in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {name, ".lock"} and (tmp_path / name).read_text() == "mine"


def test_a_folder_that_another_process_holds_is_not_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with only_one(tmp_path), pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path)])
    assert "another bylaw is at work" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
