"""Prompt files: accepted forms by hand-written examples, refusals by their messages, and the real hh-rlhf file."""

import gzip
import json
from pathlib import Path

import pytest

from bylaw.model.data import Prompt, parse_dialogue, read_prompts

REAL = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless-base-test.jsonl.gz"


def write(path: Path, *lines: object) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("name", ["set.jsonl", "set.jsonl.gz"])
def test_every_form_makes_a_prompt(tmp_path: Path, name: str) -> None:
    system = {"role": "system", "content": "be brief"}
    path = write(
        tmp_path / name,
        {"prompt": " how? "},
        {"id": 7, "prompt": "why?", "completion": "so", "source": "elsewhere"},
        {"messages": [system, user("a"), assistant("b"), user("c")]},
        {"messages": [user("a"), assistant("b")], "id": "mine"},
        {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"},
        {"prompt": [system, user("a")], "completion": [assistant("b")]},
        {"prompt": [user("a"), assistant("b"), user("c")]},
    )
    found = read_prompts(path)
    assert found.prompts == [
        Prompt("set-1", [user(" how? ")]),
        Prompt("7", [user("why?")], "so"),
        Prompt("set-3", [system, user("a"), assistant("b"), user("c")]),
        Prompt("mine", [user("a")], "b"),
        Prompt("set-5", [user("q")], "yes"),
        Prompt("set-6", [system, user("a")], "b"),
        Prompt("set-7", [user("a"), assistant("b"), user("c")]),
    ]
    assert found.skipped == [] and found.summary() == "7 prompts" and len(found) == 7


def test_limit_takes_the_first_and_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", {"prompt": "a"}, {"prompt": "b"}, "not JSON")
    assert [prompt.id for prompt in read_prompts(path, limit=2)] == ["set-1", "set-2"]
    with pytest.raises(ValueError, match=r"set\.jsonl:3: not JSON"):
        read_prompts(path, limit=3)
    with pytest.raises(ValueError, match="limit = -1"):
        read_prompts(path, limit=-1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "cut', "not JSON"),
        ("[1, 2]", "a JSON list"),
        ('{"prompt": "\\ud800"}', "not JSON"),
        ({"prompt": ""}, "prompt = ''"),
        ({"prompt": " \n"}, "prompt = "),
        ({"prompt": ["a"]}, "message 1: 'a'"),
        ({"prompt": []}, "prompt = "),
        ({"prompt": [user("a")], "completion": "b"}, "prompt = "),
        ({"prompt": [user("a")], "completion": [user("b")]}, "message 2 has the role 'user'"),
        ({"prompt": [user("a")], "completion": []}, "prompt = "),
        ({"prompt": [user("a"), assistant("b")], "completion": []}, "prompt = "),
        ({"prompt": "a", "completion": ""}, "completion = ''"),
        ({"promt": "a"}, "unknown key 'promt'; did you mean 'prompt'"),
        ({"Prompt": "a"}, "did you mean 'prompt'"),
        ({"text": "a"}, "exactly one of"),
        ({"prompt": "a", "messages": []}, "exactly one of"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b"}, "exactly one of"),
        ({"chosen": [user("a")], "rejected": "x"}, "chosen = "),
        ({"messages": []}, "messages = "),
        ({"messages": "hello"}, "messages = "),
        ({"messages": ["hello"]}, "message 1: 'hello'"),
        ({"messages": [{"role": "user"}]}, "message 1: "),
        ({"messages": [{**user("a"), "name": "Bo"}]}, "message 1: "),
        ({"messages": [{"role": "bot", "content": "a"}]}, "role = 'bot'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "role = "),
        ({"messages": [user("a"), assistant(""), user("b")]}, "message 2: content = ''"),
        ({"messages": [user("a"), assistant("")]}, "message 2: content = ''"),
        ({"messages": [user("a"), user("b")]}, "message 2 has the role 'user'"),
        ({"messages": [assistant("a")]}, "message 1 has the role 'assistant'"),
        ({"messages": [user("a"), {"role": "system", "content": "s"}]}, "message 2 has the role 'system'"),
        ({"messages": [{"role": "system", "content": "s"}]}, "the last message has the role 'system'"),
        ({"prompt": "a", "id": ""}, "id = ''"),
        ({"prompt": "a", "id": True}, "id = True"),
        ({"prompt": "a", "id": "set-1"}, "id 'set-1' is taken by line 1"),
    ],
)
def test_a_bad_line_is_an_error_that_names_it(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "set.jsonl", {"prompt": "good"}, line, {"prompt": "good"})
    with pytest.raises(ValueError, match=r"set\.jsonl:2: ") as caught:
        read_prompts(path)
    assert message in str(caught.value)


def test_blank_lines_are_no_prompts_and_count_as_lines(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n  \n')
    assert [prompt.id for prompt in read_prompts(tmp_path / "set.jsonl")] == ["set-1", "set-3"]


def test_a_missing_an_empty_and_a_truncated_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no prompts"):
        read_prompts(write(tmp_path / "empty.jsonl"))
    path = write(tmp_path / "set.jsonl.gz", *({"prompt": f"number {n}"} for n in range(500)))
    for content in (path.read_bytes()[:-20], b'{"prompt": "plain"}\n'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"set\.jsonl\.gz: not a whole gzip file"):
            read_prompts(path)


def test_a_name_inside_a_line_begins_no_turn() -> None:
    text = "\n\nHuman: he said Human: stop\nAssistant: in a line\n\nHuman:glued"
    text += "\n\nAssistant:  Human: \n\nyes \n\nHuman: ok"
    assert parse_dialogue(text) == [
        user("he said Human: stop\nAssistant: in a line\n\nHuman:glued"),
        assistant("Human: \n\nyes"),
        user("ok"),
    ]


def test_turns_in_a_row_are_joined_and_lose_no_word() -> None:
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant:\n\nAssistant:  d"
    assert parse_dialogue(text) == [user("a\n\nb"), assistant("c\n\nd")]


def comparison(chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": chosen, "rejected": rejected}


def test_hh_lines_that_make_no_prompt_are_listed_with_their_reason(tmp_path: Path) -> None:
    good = "\n\nHuman: q\n\nAssistant: a"
    path = write(
        tmp_path / "hh.jsonl",
        comparison(good, "\n\nHuman: q\n\nAssistant: b"),
        comparison(good, "\n\nHuman: other\n\nAssistant: b"),
        comparison("\n\nHuman: \n\nAssistant: a", good),
        comparison(good, "\n\nHuman: q\n\nAssistant:\n\nHuman: r\n\nAssistant: b"),
        comparison("\n\nAssistant: a", good),
        comparison("preamble" + good, good),
        comparison(good + "\n\nHuman: more", good),
        comparison("", good),
        comparison("\n\nHuman: q\n\nAssistant: ", good),
    )
    found = read_prompts(path)
    assert [(prompt.id, prompt.answer) for prompt in found] == [("hh-1", "a"), ("hh-9", "")]
    reasons = {
        2: "differ before the last Assistant turn",
        3: "chosen: turn 1 (user) is empty",
        4: "rejected: turn 2 (assistant) is empty",
        5: "does not begin with a Human turn",
        6: "does not begin with a Human turn",
        7: "does not end with an Assistant turn",
        8: "does not begin with a Human turn",
    }
    assert [line for line, _ in found.skipped] == list(reasons)
    assert all(reasons[line] in reason for line, reason in found.skipped)
    assert found.summary().startswith("2 prompts, 7 lines left out (line 2: ")
    with pytest.raises(ValueError, match=r"bad\.jsonl: no prompts; 0 prompts, 1 lines left out \(line 1: "):
        read_prompts(write(tmp_path / "bad.jsonl", comparison("", good)))


@pytest.mark.skipif(not REAL.exists(), reason=f"the real data set is not at {REAL}")
def test_the_real_file_is_read_whole() -> None:
    found = read_prompts(REAL)
    assert len(found) == 2312 and found.skipped == []
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for prompt, row in zip(found, rows, strict=True):
        # The words of the messages are the words of the text, in order, but for the speakers' names between turns.
        text = row["chosen"].replace("\n\nHuman: ", "\n\n").replace("\n\nAssistant: ", "\n\n")
        spoken = [message["content"] for message in prompt.messages] + [prompt.answer]
        assert " ".join(spoken).split() == text.split(), prompt.id
        assert prompt.messages[-1]["role"] == "user" and all(message["content"] for message in prompt.messages)
    # An empty chosen answer still makes a prompt; two assistant turns in a row are one message.
    assert [int(prompt.id.rsplit("-", 1)[1]) for prompt in found if not prompt.answer] == [87, 517, 926, 1104]
    assert found.prompts[1254].answer.count("\n\n") == 1 and len(found.prompts[1254].messages) == 3
