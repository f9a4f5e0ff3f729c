"""Labels by judges that are not the run's own: behind HTTP, and of another folder."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import tokenizers
from judge_server import KEY, QUICK, Body, Reply, chat_answer, completion_answer, reader, serving
from small_run import WORDS, tiny_llama, word_tokenizer, write_lines, write_run

from bylaw.cli import main
from bylaw.constitution.schema import Constitution
from bylaw.inputs import Run
from bylaw.judges import server_reader
from bylaw.model.checkpoint import checkpoint_hash, load_model, save_model
from bylaw.model.engine import Engine
from bylaw.model.parallel import ALONE
from bylaw.model.records import Record, read_records
from bylaw.model.sampler import turn
from bylaw.model.tokenizer import Tokenizer
from bylaw.pipeline import run_pipeline
from bylaw.recipe import Recipe, load_recipe
from bylaw.rlaif.config import LabelConfig, RemoteConfig
from bylaw.rlaif.judge import Judge
from bylaw.rlaif.label import label, preferences
from bylaw.rlaif.reader import FILTERED, LocalReader, Reader


def pair(number: int, a: str, b: str) -> Record:
    talk = [turn("user", f"w{number % 20} w{number // 20}")]
    return {"id": f"p{number}", "prompt_id": f"p{number}", "prompt": talk, "a": {"text": a}, "b": {"text": b}, "by": {}}


TEXTS = ["good w1", "w2 bad", "good good w3", "w4"]
PAIRS = [pair(n, TEXTS[n % 4], TEXTS[n // 4 % 4]) for n in range(24)]


def transcribed(judge: Any, tokenizer: Tokenizer) -> Reply:
    """`judge` behind /v1/completions."""

    def reply(body: Body) -> Body:
        if "which rule" not in body["prompt"]:  # the check's question
            return completion_answer({"A": -0.1})
        a, b = judge._letters(tokenizer.encode(body["prompt"]))
        return completion_answer({" A": a, " B": b, "</s>": math.log(0.5)})

    return reply


def test_labels_of_a_known_judge_are_equal_here_and_behind_http_also_after_a_kill(
    known_judge: Any, tokenizer: Tokenizer, constitution: Constitution, tmp_path: Path
) -> None:
    def judge(reader: Reader) -> Judge:
        config = LabelConfig(principles="all", pairs_per_chunk=5)
        return Judge(reader=reader, constitution=constitution, config=config, seed=5)

    known_judge.bias, config = 1.0, {"style": "completions"}
    here = LocalReader(engine=known_judge, seed=5, prefix="so :", hash="here")
    counts = label(judge(here), PAIRS, tmp_path / "here.jsonl")
    working = [True]

    def fault(body: Body, attempt: int) -> Any:
        return None if working[0] or len(server.seen) < 51 else 500  # within the third chunk of 20

    with serving(transcribed(known_judge, tokenizer), fault) as server:
        there = reader(server.url, **config)
        assert label(judge(there), PAIRS, tmp_path / "there.jsonl") == counts
        working[0] = False
        server.seen.clear()
        with pytest.raises(ConnectionError, match="of 20: failed 4 times, the last time: status 500"):
            label(judge(there), PAIRS, tmp_path / "killed.jsonl")
        kept = (tmp_path / "killed.jsonl").read_bytes()
        working[0] = True
        label(judge(there), PAIRS, tmp_path / "killed.jsonl")
    whole = (tmp_path / "there.jsonl").read_bytes()
    assert kept.count(b"\n") == 10 and whole.startswith(kept) and (tmp_path / "killed.jsonl").read_bytes() == whole
    for one, other in zip(read_records(tmp_path / "here.jsonl"), read_records(tmp_path / "there.jsonl"), strict=True):
        assert one.pop("by")["model"] == "here" and other.pop("by")["model"] == there.hash
        assert one == other
    assert counts["labels"] == 24 and counts["position_bias"] > 0.1


def test_one_question_that_a_content_filter_refuses_does_not_hold_up_the_labels(
    known_judge: Any, tokenizer: Tokenizer, constitution: Constitution, tmp_path: Path
) -> None:
    def fault(body: Body, attempt: int) -> Any:
        said = {"error": {"message": "triggered our content management policy", "code": "content_filter"}}
        return (400, {}, json.dumps(said)) if "w7 w0" in body["prompt"] else None

    with serving(transcribed(known_judge, tokenizer), fault) as server:
        there = reader(server.url, style="completions")
        judge = Judge(reader=there, constitution=constitution, config=LabelConfig(pairs_per_chunk=5), seed=5)
        counts = label(judge, PAIRS, tmp_path / "there.jsonl")
    assert counts["labels"] == 23 and counts["abstained"] == {FILTERED: 1}
    assert read_records(tmp_path / "there.jsonl")[7]["abstained"] == FILTERED


def test_labels_of_a_server_that_lists_one_letter_say_that_they_are_bounds(
    constitution: Constitution, tmp_path: Path
) -> None:
    with serving(lambda body: chat_answer({"A": -0.1, "x": -3.0})) as server:
        judge = Judge(reader=reader(server.url), constitution=constitution, config=LabelConfig(), seed=5)
        label(judge, PAIRS[:1], tmp_path / "there.jsonl")
    [one] = read_records(tmp_path / "there.jsonl")[0]["labels"]
    assert one["a_first"]["bounded"] is one["b_first"]["bounded"] is True


# Recipes.


def small_run(folder: Path) -> Recipe:
    """A recipe whose pairs are made."""
    recipe = load_recipe(write_run(folder))
    (recipe.out / "compare").mkdir(parents=True)
    texts = ["with glue", "no", "kind and never rude", "ask them first"]
    write_lines(recipe.out / "compare" / "pairs.jsonl", [pair(n, texts[n % 4], texts[-n // 3]) for n in range(7)])
    return recipe


def labelled(recipe: Recipe) -> tuple[dict[str, Any], list[Record]]:
    manifest = run_pipeline(recipe, ("label",))["label"]
    records = read_records(recipe.out / "label" / "preferences.jsonl")
    shutil.rmtree(recipe.out / "label")
    return manifest, records


def test_a_recipe_with_a_judge_behind_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    recipe = small_run(tmp_path)
    engine, tokenizer, lock = Engine(load_model(recipe.base), Tokenizer.load(recipe.base)), word_tokenizer(), Lock()
    options = [[id] for id in tokenizer.option_ids((" A", " B"))]

    def reply(body: Body) -> Body:
        with lock:
            [[a, b]] = engine.score([(tokenizer.encode(body["prompt"]), options)])
        return completion_answer({" A": a, " B": b})

    _, here = labelled(recipe)
    with serving(reply) as server:
        settings = RemoteConfig(**{**QUICK, "style": "completions", "timeout_seconds": 5.0})
        remote = dataclasses.replace(recipe, judge=server.url, judge_server=settings)
        manifest, there = labelled(remote)
        assert server.seen[0][2]["Authorization"] == f"Bearer {KEY}"
        run_pipeline(remote, ("label",))
    assert [one["p_a"] for one in there] == pytest.approx([one["p_a"] for one in here], abs=1e-6)
    assert len({one["p_a"] for one in there}) > 3
    assert manifest["inputs"]["judge"] == there[0]["by"]["model"] == f"{server.url} m (completions, 20 log-probs)"
    assert manifest["counts"]["server"]["requests"] == 15  # one of them the check's
    run_pipeline(remote, ("label",))  # done, so that nobody asks the server, which is gone
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if KEY.encode() in path.read_bytes()]
    assert load_recipe(recipe.out / "recipe.toml") == remote
    shutil.rmtree(recipe.out / "label")
    with pytest.raises(ValueError, match=r"stage label: the judge cannot be asked: .*connection failed"):
        run_pipeline(remote, ("label",))
    assert not (recipe.out / "label").exists()


def test_of_ranks_that_share_out_matrices_the_first_asks(tmp_path: Path) -> None:
    remote = dataclasses.replace(small_run(tmp_path), judge="http://localhost:1/v1", judge_server=RemoteConfig(**QUICK))
    ranks = [dataclasses.replace(ALONE, tensor_rank=rank, tensor_ranks=2) for rank in (0, 1)]
    assert [server_reader(Run(remote, rank)).asks for rank in ranks] == [True, False]


def test_other_examples_are_other_labels(tmp_path: Path) -> None:
    recipe = small_run(tmp_path)
    shown = """[[comparison]]\nprompt = "how ?"\nprinciple = "kind"\na = "please"\nb = "rude"\nbetter = "a"
reasons = "{a}"\n"""
    (tmp_path / "small.examples.toml").write_text(shown)
    recipe = dataclasses.replace(recipe, label=dataclasses.replace(recipe.label, shots=1, min_option_mass=0.0))
    manifest = run_pipeline(recipe, ("label",))["label"]
    assert manifest["inputs"]["examples"] == Run(recipe).examples.hash
    (tmp_path / "small.examples.toml").write_text(shown.replace("please", "yes"))
    with pytest.raises(ValueError, match=r"label was begun by another recipe: inputs.examples is"):
        run_pipeline(recipe, ("label",))


def test_the_servers_judge_of_a_run_on_questions_whose_answers_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is sure of A, which is right in one question of two."""
    recipe = small_run(tmp_path)
    questions = [{"id": str(n), "prompt": "which ?", "options": ["yes", "no"], "answer": n} for n in (0, 1)]
    write_lines(tmp_path / "q.jsonl", questions)
    write_lines(tmp_path / "three.jsonl", [questions[0] | {"options": ["a", "b", "c"]}])
    with serving(lambda body: chat_answer({"A": math.log(0.9), "B": math.log(0.1)})) as server:
        remote = dataclasses.replace(recipe, judge=server.url, judge_server=RemoteConfig(**QUICK))
        run_pipeline(remote, ("label",))
        capsys.readouterr()
        server.seen.clear()
        main(["judge", str(recipe.out), str(tmp_path / "q.jsonl"), "--json"])
        found = json.loads(capsys.readouterr().out)
        asked = [body["messages"][-1]["content"] for _, body, _ in server.seen[1:]]
        for arguments, message in (
            (
                [str(tmp_path / "three.jsonl")],
                r"question '0' has the options [' (A)', ' (B)', ' (C)']; a server is asked",
            ),
            ([str(tmp_path / "q.jsonl"), "--by", "texts"], "a server tells log-probs of letters alone"),
        ):
            with pytest.raises(SystemExit):
                main(["judge", str(recipe.out), *arguments])
            assert message in capsys.readouterr().err
    assert (found["accuracy"], found["read"], found["style"]) == (0.5, 2, "chat")
    assert found["ece"] == pytest.approx(0.4) and found["option_mass"]["mean"] == pytest.approx(1.0)
    assert len(asked) == 2 and all(one.endswith("The answer is: (") and "(B) no" in one for one in asked)


def test_a_recipe_with_a_judge_of_another_folder_reads_with_its_own_tokenizer(tmp_path: Path) -> None:
    recipe = small_run(tmp_path)
    words = [*WORDS[:2], *reversed(WORDS[2:])]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer, model = Tokenizer.from_parts(backend, eos_token="<eos>"), tiny_llama()
    save_model(model, tmp_path / "other", tokenizer)
    text = (tmp_path / "recipe.toml").read_text()
    (tmp_path / "recipe.toml").write_text('judge = "other"\n' + text)
    other = load_recipe(tmp_path / "recipe.toml")
    assert other.judge == str(tmp_path / "other")
    manifest, records = labelled(other)
    run = Run(other)
    reader = LocalReader(engine=Engine(model, tokenizer), seed=3, prefix="The answer is:", hash="x")
    judge = dataclasses.replace(run.judge(reader), reader=reader)
    assert [one["p_a"] for one in preferences(judge, [*read_records(recipe.out / "compare" / "pairs.jsonl")])] == (
        pytest.approx([one["p_a"] for one in records], abs=1e-6)
    )
    _, here = labelled(recipe)
    assert [one["p_a"] for one in here] != pytest.approx([one["p_a"] for one in records], abs=1e-3)
    assert manifest["inputs"]["judge"] == checkpoint_hash(tmp_path / "other")


def test_judges_that_a_recipe_cannot_name(tmp_path: Path) -> None:
    recipe = small_run(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"me': no such folder; allowed: 'base', 'sl-cai', a checkpoint's folder"
    ):
        run_pipeline(dataclasses.replace(recipe, judge=str(tmp_path / "me")), ("label",))
    with pytest.raises(ValueError, match=r"judge_server.model = '' is not possible; allowed: the model's name"):
        dataclasses.replace(recipe, judge="https://host/v1")
    with pytest.raises(ValueError, match="judge is a URL that cannot be used") as refused:
        dataclasses.replace(recipe, judge="https://me:hunter2@host/v1")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ValueError, match="judge = '' is not possible"):
        dataclasses.replace(recipe, judge="")
