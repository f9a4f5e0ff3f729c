"""`bylaw trace`: every record of a run resolves, and what is said of training is what the trainers did."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from small_run import CONSTITUTION, write_lines

import bylaw.model.fit as fit_module
from bylaw.check import check
from bylaw.cli import main
from bylaw.layout import parts
from bylaw.ledger import Ledger
from bylaw.model.supervised import Example
from bylaw.model.tokenizer import Tokenizer
from bylaw.pipeline import run_pipeline
from bylaw.recipe import dump_recipe, load_recipe
from bylaw.report import ReportConfig
from bylaw.report.gather import gather
from bylaw.report.page import render
from bylaw.rlaif.dpo import Referenced
from bylaw.rlaif.pairs import Pair
from bylaw.trace import Tracer
from bylaw.trace_text import describe

MIXED = 0.123
TEXTS = {"kind": "The answer is kind .", "care": "it never hurts"}


@pytest.fixture(scope="module")
def tracer(finished: Path) -> Tracer:
    return Tracer(Ledger(finished))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outputs(run: Path, stage: str) -> dict[str, str]:
    return json.loads((run / stage / "manifest.json").read_text())["outputs"]


def test_every_record_of_a_run_resolves(finished: Path, tracer: Tracer) -> None:
    chains, pairs = records(finished / "revise" / "chains.jsonl"), records(finished / "compare" / "pairs.jsonl")
    for chain in chains:
        whole = tracer.trace(chain["id"])
        assert whole["chain"]["answer"] == chain["answer"] and whole["chain"]["by"] == chain["by"]
        for step in chain["rounds"]:
            found = tracer.trace(f"{chain['id']}@{step['round']}")
            last = found["chain"]["rounds"][-1]
            assert (last["critique"], last["revision"]) == (step["critique"], step["revision"])
            assert last["principle"]["statement"] == TEXTS[step["principle"]["id"]]
            assert found["chain"]["rounds"] == whole["chain"]["rounds"][: step["round"]]
            assert [one["epoch"] for one in last["finetune"]["steps"]] == [1, 2]
            assert last["finetune"]["model"] == outputs(finished, "finetune")["sl-cai"]
    for sample in records(finished / "revise" / "helpful.jsonl"):
        (found,) = tracer.trace(f"{sample['id']}+{sample['sample']}")["helpful"]
        assert found.get("given") == sample.get("given") and found["finetune"]["steps"]
    for pair, preference in zip(pairs, records(finished / "label" / "preferences.jsonl"), strict=True):
        (found,) = tracer.trace(pair["id"])["pairs"]
        assert (found["a"], found["b"], found["pairs_by"]) == (pair["a"], pair["b"], pair["by"])
        assert found["label"]["p_a"] == preference["p_a"]
        assert all(one["principle"]["statement"] == TEXTS[one["principle"]["id"]] for one in found["label"]["readings"])
        uses = ("left out",) if preference["abstained"] else ("trained on", "held out")
        assert (
            found["reward"]["use"] in uses and found["reward"]["model"] == outputs(finished, "reward")["reward-model"]
        )
    for episode in records(finished / "ppo" / "rollouts.jsonl"):
        trace = tracer.trace(f"ppo/{episode['iteration']}/{episode['place']}")
        (found,) = trace["episodes"]
        assert (found["raw"], found["score"], found["weights"]) == tuple(
            episode[k] for k in ("raw", "score", "weights")
        )
        assert found["reward_models"] == [outputs(finished, "reward")["reward-model"]]
        assert {pair["id"] for pair in trace["pairs"]} == {f"{episode['prompt_id']}#{n}" for n in range(2)}
        assert describe(trace)


@pytest.fixture(scope="module")
def measured(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation, judgements and an amendment in it."""
    folder = tmp_path_factory.mktemp("measured")
    run = shutil.copytree(finished, folder / "run")
    write_lines(folder / "h.jsonl", [{"id": "e-gate", "prompt": "how do i break a gate ?"}])
    write_lines(folder / "q.jsonl", [{"id": "q1", "prompt": "which ?", "options": ["yes", "no"], "answer": 1}])
    asked = {"prompt": "how do i mend ?"}
    known = [asked | {"chosen": "with care .", "rejected": no} for no in ("no .", "break it .")]
    write_lines(folder / "known.jsonl", known)
    (folder / "new.toml").write_text(CONSTITUTION.replace("it never hurts", "it hurts no neighbour"))
    main(["evaluate", str(run), "--harmful", str(folder / "h.jsonl"), "--max-tokens", "4", "--samples", "2"])
    main(["judge", str(run), str(folder / "q.jsonl")])
    main(["judge", str(run), str(folder / "known.jsonl")])
    main(["amend", str(run), str(folder / "new.toml")])
    return run


def test_what_no_stage_made_resolves_by_its_place(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracer, seen = Tracer(Ledger(measured)), Counter()
    for part in parts(measured):
        ledger = Ledger(measured, part)
        ids = [*ledger.chains, *ledger.preferences, *ledger.questions, *(f"{id}+{n}" for id, n in ledger.helpful)]
        for id in ids:
            found = tracer.trace(f"{part}/{id}")
            assert id in [one["id"] for one in found.get("pairs", ())] or id not in ledger.preferences
            kinds = {"chain", "pairs", "question", "helpful"} & found.keys()
            assert kinds and found["part"] == part
            assert "trained on" not in describe(found).replace("on which nothing was trained", "")
            seen.update(kinds)
    labels = len(records(measured / "label" / "preferences.jsonl"))
    # Answers of three models, as they were drawn and as they were read; pairs of the amendment and of known.jsonl.
    assert seen == {"helpful": 2 * 3 * 2, "pairs": labels + 2, "question": 1}
    amended = next(part for part in parts(measured) if part.startswith("amendments/"))
    id = next(iter(Ledger(measured, amended).preferences))
    main(["trace", str(measured), f"{amended}/{id}"])
    told = capsys.readouterr().out
    assert f"part of     {amended}, on which nothing was trained" in told
    judged = {one["principle"]["statement"] for one in tracer.trace(f"{amended}/{id}")["pairs"][0]["label"]["readings"]}
    assert judged <= {"The answer is kind .", "it hurts no neighbour"}
    with pytest.raises(ValueError, match=rf"'nowhere#0': no record of .*{amended} has this id"):
        tracer.trace(f"{amended}/nowhere#0")


def test_preferences_that_a_file_gave_are_kept_and_lead_back_to_their_line(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "reward")
    shutil.rmtree(run / "ppo")
    given = [{"prompt": "how do i mend it ?", "chosen": "with care .", "rejected": no} for no in ("no .", "break it .")]
    write_lines(tmp_path / "people.jsonl", given)
    recipe = dataclasses.replace(load_recipe(run / "recipe.toml"), helpful_preferences=str(tmp_path / "people.jsonl"))
    reward = dataclasses.replace(recipe.reward, helpful_ratio=0.1)
    manifest = run_pipeline(dataclasses.replace(recipe, out=run, reward=reward), ("reward",))["reward"]
    (tmp_path / "people.jsonl").unlink()
    kept = list(Ledger(run, "reward/helpful").preferences)
    assert len(kept) == manifest["counts"]["helpful_pairs"] == 1 and set(kept) < {"people-1", "people-2"}
    found = Tracer(Ledger(run)).trace(f"reward/helpful/{kept[0]}")
    [pair] = found["pairs"]
    assert pair["a"]["text"] == "with care ." and pair["reward"]["model"] == manifest["outputs"]["reward-model"]
    assert [one["id"] for one in found["pairs"]] == kept  # and not the other one of its prompt
    told = describe(found)
    assert f"given by    people.jsonl, line {kept[0][-1]}" in told and "trained on, epoch 1 step" in told
    assert "nothing was trained" not in told and not check(run).problems
    assert ", 1 of them from a file of preferences, to give" in render(gather(run), ReportConfig())


@pytest.mark.parametrize("id", ["a#x", "ppo/0/1", "prompt:x", "p-fence", "h/i@1"])
def test_a_preference_that_a_file_gave_may_have_any_id(finished: Path, tmp_path: Path, id: str) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "reward")
    shutil.rmtree(run / "ppo")
    rows = [{"id": name, "prompt": "how ?", "chosen": "with care .", "rejected": "no ."} for name in ("a", id)]
    write_lines(tmp_path / "people.jsonl", rows)
    recipe = dataclasses.replace(load_recipe(run / "recipe.toml"), helpful_preferences=str(tmp_path / "people.jsonl"))
    reward = dataclasses.replace(recipe.reward, helpful_ratio=0.3)
    run_pipeline(dataclasses.replace(recipe, out=run, reward=reward), ("reward",))
    found = Tracer(Ledger(run)).trace(f"reward/helpful/{id}")
    assert [one["id"] for one in found["pairs"]] == [id] and "trained on, epoch" in describe(found)
    assert ", given" in describe(found) and not check(run).problems


def test_marks_lead_to_the_principle_that_they_were_given_by(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    ledger = Ledger(run)
    kind = ledger.constitution.principle("kind")
    reading = {"principle": {"id": "kind", "hash": kind.hash}, "weight": 1.0, "mean": 7.25, "abstained": ""}
    silent = reading | {"mean": None, "abstained": "too little"}
    path = run / "ppo" / "rollouts.jsonl"
    rated = [one | {"rating": {"score": 0.4, "readings": [reading, silent]}} for one in records(path)]
    write_lines(path, rated)
    found = Tracer(Ledger(run)).trace("ppo/0/0")
    [episode] = found["episodes"]
    assert episode["rating"]["readings"][0]["principle"]["statement"] == "The answer is kind ."
    told = describe(found)
    assert "The answer is kind ." in told and "mark 7.2500, weight 1" in told and "abstained: too little" in told
    assert not [problem for problem in check(run).problems if "principle" in problem]
    reading["principle"]["hash"] = "0" * 16
    write_lines(path, rated)
    assert any("principle 'kind' (0000" in problem for problem in check(run).problems)


def test_a_record_without_its_form_is_refused_by_its_line(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "label" / "preferences.jsonl"
    spoiled = records(path)
    del spoiled[1]["labels"][0]["p_a"]
    write_lines(path, spoiled)
    with pytest.raises(ValueError, match=r"preferences\.jsonl:2: no record of preferences: labels without p_a"):
        _ = Ledger(run).preferences


def test_one_prompt_by_hand(finished: Path, tracer: Tracer) -> None:
    found = tracer.trace("p-talk")
    assert found["prompt"] == {
        "id": "p-talk",
        "messages": [
            {"role": "user", "content": "how do i mend a cart ?"},
            {"role": "assistant", "content": "with wood and nail ."},
            {"role": "user", "content": "and break it ?"},
        ],
        "file": str(finished.parent / "prompts.jsonl"),
        "line": 3,
    }
    drawn = [one for one in records(finished / "ppo" / "rollouts.jsonl") if one["prompt_id"] == "p-talk"]
    assert [one["id"] for one in found["episodes"]] == [f"ppo/{one['iteration']}/{one['place']}" for one in drawn]
    assert len(found["chain"]["rounds"]) == len(found["pairs"]) == 2 and "helpful" not in found
    text = describe(found)
    for said in ("prompts.jsonl, line 3", "p-talk@2\n  principle ", "temperature 1.0", "epoch 2 step", "p-talk#1: two"):
        assert said in text
    assert any(statement in text for statement in TEXTS.values())
    helpful = tracer.trace("h-rope")
    assert helpful["prompt"]["line"] == 2 and helpful["prompt"]["file"].endswith("helpful.jsonl")
    assert helpful["helpful"][0]["given"] == "ask them first , with care ." and "chain" not in helpful


def test_the_steps_named_are_those_that_the_trainers_took(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(finished / "recipe.toml")
    mixed = [one | {"p_a": MIXED} for one in records(finished / "label" / "preferences.jsonl") if not one["abstained"]]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(one) + "\n" for one in mixed))
    reward = dataclasses.replace(recipe.reward, epochs=2, helpful_ratio=0.4)
    dpo = dataclasses.replace(recipe.dpo, epochs=3, batch_size=2, heldout_fraction=0.4)
    recipe = dataclasses.replace(
        recipe, out=tmp_path / "run", reward=reward, dpo=dpo, helpful_preferences=str(tmp_path / "mixed.jsonl")
    )
    for stage in ("revise", "compare", "label"):
        shutil.copytree(finished / stage, recipe.out / stage)
    shutil.copytree(finished / "constitutions", recipe.out / "constitutions")
    batches: list[list[Any]] = []
    accumulate = fit_module.accumulate

    def spied(objective: Any, batch: Any, *rest: Any) -> Any:
        batches.append(list(batch))
        return accumulate(objective, batch, *rest)

    monkeypatch.setattr(fit_module, "accumulate", spied)
    run_pipeline(recipe, ("finetune", "reward", "dpo"))
    tracer = Tracer(Ledger(recipe.out))
    taken = [batch for batch in batches if isinstance(batch[0], Example)]
    assert [Counter(tuple(one.ids) for one in batch) for batch in taken] == claimed_texts(tracer, len(taken))
    for stage, kind in (("reward", Pair), ("dpo", Referenced)):
        told = [
            sorted(getattr(one, "pair", one).p_a for one in batch) for batch in batches if isinstance(batch[0], kind)
        ]
        own = [[label for label in labels if label != MIXED] for labels in told]
        assert own == claimed_labels(tracer, stage, len(told)) and (own != told) == (stage == "reward")
        given = Counter(
            visit["step"]
            for id in (Ledger(recipe.out, "reward/helpful").preferences if stage == "reward" else ())
            for visit in tracer.trace(f"reward/helpful/{id}")["pairs"][0]["reward"]["steps"]
        )
        assert [len(labels) - len(ours) for labels, ours in zip(told, own, strict=True)] == [
            given[step] for step in range(len(told))
        ]
    assert not check(recipe.out).problems


def claimed_texts(tracer: Tracer, steps: int) -> list[Counter[tuple[int, ...]]]:
    """By step, the token ids of the texts that a trace says it learned."""
    ledger, tokenizer = tracer.ledger, Tokenizer.load(tracer.ledger.recipe.base)
    claims: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(steps)]
    for id, dialogue in ledger.prompts.items():
        found = tracer.trace(f"prompt:{id}")
        learned = [(one["revision"], one["finetune"]) for one in found.get("chain", {}).get("rounds", [])]
        learned += [(one.get("answer"), one["finetune"]) for one in found.get("helpful", [])]
        for text, fate in learned:
            ids = tokenizer.prompt_ids(dialogue)
            # The one helpful answer that is given: its words, as this tokenizer has them, and the end of text.
            ids += text["ids"] if text else [*tokenizer.encode("ask them first , with care ."), 1]
            for one in fate["steps"]:
                claims[one["step"]][tuple(ids)] += 1
    return claims


def claimed_labels(tracer: Tracer, stage: str, steps: int) -> list[list[float]]:
    claims: list[list[float]] = [[] for _ in range(steps)]
    for id in tracer.ledger.preferences:
        (pair,) = tracer.trace(id)["pairs"]
        for one in pair[stage].get("steps", []):
            claims[one["step"]].append(pair["label"]["p_a"])
    return [sorted(labels) for labels in claims]


def test_what_was_left_out_of_training_has_its_reason(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "revise" / "chains.jsonl"
    chains = records(path)
    chains[0]["rounds"][0]["revision"] = {"text": "", "ids": [1], "finish": "stop"}
    path.write_text("".join(json.dumps(chain) + "\n" for chain in chains))
    with pytest.raises(ValueError, match="finetune learned from 15 examples, but its records make 14 now"):
        Tracer(Ledger(run)).trace("p-fence@1")
    manifest = run / "finetune" / "manifest.json"
    told = json.loads(manifest.read_text())
    told["counts"]["revisions"] -= 1
    manifest.write_text(json.dumps(told))
    found = Tracer(Ledger(run)).trace("p-fence@1")
    assert found["chain"]["rounds"][0]["finetune"]["left_out"] == "the revision is empty"
    assert "no, left out: the revision is empty" in describe(found)
    (run / "ppo" / "manifest.json").unlink()
    manifest.unlink()
    found = Tracer(Ledger(run)).trace("p-fence")
    assert found["chain"]["rounds"][0]["finetune"] == {"unfinished": True}
    assert "not yet: finetune has not finished" in describe(found)


def test_pairs_over_the_context_are_told_and_the_steps_of_the_others_stay_true(finished: Path, tmp_path: Path) -> None:
    """As if the model had a shorter context when it was trained: some pairs fit, and only they have steps."""
    run = shutil.copytree(finished, tmp_path / "run")
    labelled = [one for one in records(run / "label" / "preferences.jsonl") if not one["abstained"]]
    tokenizer = Tokenizer.load(run / "finetune" / "sl-cai")
    longest = {
        one["id"]: max(len(tokenizer.prompt_ids(one["prompt"])) + len(one[side]["ids"]) for side in "ab")
        for one in labelled
    }
    context = sorted(longest.values())[len(longest) // 2]
    over = {id for id, tokens in longest.items() if tokens > context}
    assert over and len(over) < len(longest)
    before = {one["id"]: Tracer(Ledger(run)).trace(one["id"])["pairs"][0]["reward"]["use"] for one in labelled}
    config, manifest = run / "finetune" / "sl-cai" / "config.json", run / "reward" / "manifest.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": context}))
    told = json.loads(manifest.read_text())
    fits = [id for id in before if before[id] == "trained on" and id not in over]
    told["counts"] |= {"over_context": len(over), "train_pairs": len(fits)}
    manifest.write_text(json.dumps(told))
    tracer = Tracer(Ledger(run))
    found = {id: tracer.trace(id)["pairs"][0] for id in before}
    for id, one in found.items():
        assert one["reward"]["use"] == ("left out" if id in over else before[id])
        assert bool(one["reward"].get("steps")) == (id in fits)
    left = next(iter(over))
    reason = f"longer than the model's context of {context} tokens"
    assert found[left]["reward"]["reason"] == reason and reason in describe(tracer.trace(left))


def test_critic_warm_up_and_a_stop_are_told(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "ppo" / "manifest.json"
    told = json.loads(path.read_text())
    told["config"]["critic_warmup"], told["counts"]["iterations"] = 1, 5
    path.write_text(json.dumps(told))
    tracer = Tracer(Ledger(run))
    learned = {n: tracer.trace(f"ppo/{n}/0")["episodes"][0]["learned_by"] for n in (0, 1, 5)}
    assert learned == {0: ["value"], 1: ["policy", "value"], 5: []}
    assert "no: the run was stopped" in describe(tracer.trace("ppo/5/0"))
    del told["inputs"]["reward-model"]
    told["inputs"]["judge"] = "cafe" * 16
    path.write_text(json.dumps(told))
    assert "from judge cafecafecafecafe\n" in describe(Tracer(Ledger(run)).trace("ppo/0/0"))
    path.unlink()
    assert "not yet: ppo has not finished" in describe(Tracer(Ledger(run)).trace("ppo/0/0"))


@pytest.fixture
def odd(finished: Path, tmp_path: Path) -> Tracer:
    """A run that has begun, with prompt ids that look like other ids, and text that would steer a terminal."""
    (tmp_path / "revise").mkdir()
    text = {"text": "\x1b[31mred\x9b \u202e", "ids": [1], "finish": "stop"}
    step = {"round": 1, "principle": {"id": "kind", "hash": "0"}, "critique": text, "revision": text}
    by = {"seed": 1, "sampling": {}, "model": "m", "tokenizer": "t", "constitution": "c"}
    chains = [
        {"id": id, "prompt": [{"role": "user", "content": "x\ny"}], "answer": text, "rounds": [step], "by": by}
        for id in ("a", "a@1", "a@1@1", "ppo/0/0", "pair:x", "a+0#3", "\x1b[2J")
    ]
    lines = "".join(json.dumps(chain) + "\n" for chain in chains)
    (tmp_path / "revise" / "chains.jsonl").write_text(lines + '{"id": "torn')
    (tmp_path / "recipe.toml").write_text(dump_recipe(load_recipe(finished / "recipe.toml")))
    return Tracer(Ledger(tmp_path))


def test_ids_are_unambiguous(odd: Tracer) -> None:
    assert odd.trace("a")["id"] == "prompt:a"
    assert odd.trace("a+0#3")["id"] == "prompt:a+0#3"
    assert odd.trace("a+0#3@1")["id"] == "round:a+0#3@1"
    assert odd.trace("a@1@1@1")["id"] == "round:a@1@1@1"
    for id in ("a@1", "a@1@1"):
        with pytest.raises(ValueError, match=f"several meanings here; say which: 'prompt:{id}', 'round:{id}'"):
            odd.trace(id)
        assert odd.trace(f"prompt:{id}")["prompt"]["id"] == id
        assert odd.trace(f"round:{id}")["prompt"]["id"] == id.removesuffix("@1")
    assert odd.trace("prompt:ppo/0/0")["prompt"]["id"] == "ppo/0/0"
    assert odd.trace("prompt:pair:x")["prompt"]["id"] == "pair:x"
    for id in ("ppo/0/0", "pair:x", "a@2", "a@01", "b"):
        with pytest.raises(ValueError, match=r"no record of .* has this id"):
            odd.trace(id)


def test_nothing_steers_the_terminal_and_gaps_are_told(odd: Tracer) -> None:
    for name in ("\x1b[2J", "a"):
        text = describe(odd.trace(name))
        assert all(letter.isprintable() or letter == "\n" for letter in text)
        assert "\\x1b[31mred\\x9b \\u202e" in text and "x\n              y" in text
    assert "no text: there is no constitutions/c.toml" in text
    assert "it has no such prompt" in text and "not yet: finetune has not finished" in text


def test_the_command(finished: Path, tracer: Tracer, capsys: pytest.CaptureFixture[str]) -> None:
    main(["trace", str(finished), "p-gate@2", "--json"])
    assert json.loads(capsys.readouterr().out) == tracer.trace("p-gate@2")
    main(["trace", str(finished), "p-gate@2"])
    assert capsys.readouterr().out == describe(tracer.trace("p-gate@2")) + "\n"
    for id, said in (
        ("p-gat", "near it: 'p-gate'"),
        ("ppo/6/0", "episodes are ppo/0/0 to ppo/5/3"),
        ("q", "8 prompts"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["trace", str(finished), id])
        assert end.value.code == 2 and said in capsys.readouterr().err
    for args in ([str(finished)], [str(finished.parent), "p-gate"]):
        with pytest.raises(SystemExit):
            main(["trace", *args])
        assert "bylaw trace: " in capsys.readouterr().err
