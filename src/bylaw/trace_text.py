"""What `bylaw trace` prints. All text of models and prompts goes through `printable`: none of it steers a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from bylaw.layout import MIXED_IN
from bylaw.words import printable

Told = Mapping[str, Any]


def describe(found: Told) -> str:
    """A trace (bylaw.trace) as lines that a person reads."""
    lines = [*_prompt(found["prompt"])]
    if "part" in found:
        given = found["part"] in MIXED_IN.values()
        lines.append(_line("part of", found["part"] + ("" if given else ", on which nothing was trained")))
    if "question" in found:
        lines += _question(found["question"])
    if "chain" in found:
        lines += _chain(found["chain"])
    for sample in found.get("helpful", []):
        lines += _helpful(sample)
    for pair in found.get("pairs", []):
        lines += _pair(pair)
    for episode in found.get("episodes", []):
        lines += _episode(episode)
    return "\n".join(lines)


def _line(label: str, text: str, indent: int = 2) -> str:
    """A labelled text; its further lines stand under its first."""
    head = f"{'':{indent}}{label:<12}"
    return head + printable(text).replace("\n", "\n" + " " * len(head))


def _prompt(prompt: Told) -> Iterator[str]:
    yield f"prompt {printable(prompt['id'])}"
    for message in prompt["messages"]:
        yield _line(message["role"], message["content"])
    if "file" in prompt:
        yield _line("from", f"{prompt['file']}, line {prompt['line']}")
    if "note" in prompt:
        yield _line("note", prompt["note"])


def _chain(chain: Told) -> Iterator[str]:
    yield ""
    yield "chain: answer, then critique and revision by a principle"
    yield from _by(chain["by"])
    if chain.get("shots"):
        yield _line("examples", ", ".join(map(str, chain["shots"])))
    yield _text("answer", chain["answer"])
    for step in chain["rounds"]:
        yield ""
        yield printable(step["id"])
        yield from _principle(step["principle"])
        for part in ("critique", "revision"):
            if step.get(part):
                yield _text(part, step[part])
        if "finetune" in step:
            yield _line("trained on", _fate(step["finetune"]))


def _question(question: Told) -> Iterator[str]:
    yield ""
    yield f"{printable(question['id'])}: a question whose answer is known"
    if "prompt" in question:  # else an earlier bylaw asked it
        yield _line("asked", question["prompt"])
    for place, option in enumerate(question["options"]):
        said = f"log-prob {question['logprobs'][place]:.4f}" if question["logprobs"] else question["abstained"]
        yield _line("right" if place in question["right"] else "wrong", f"{option}  [{said}]")


def _helpful(sample: Told) -> Iterator[str]:
    yield ""
    yield f"{printable(sample['id'])}: {'a helpful sample' if 'finetune' in sample else 'an answer'}"
    if "given" in sample:
        yield _line("given", sample["given"])
    else:
        yield from _by(sample["by"])
        yield _text("answer", sample["answer"])
    if "reading" in sample:
        reading = sample["reading"]
        named = f", naming {', '.join(reading['named'])}" if reading.get("named") else ""
        why = f" ({reading['why']})" if reading.get("why") else ""
        yield _line("read as", f"{reading['kind']}{named}{why}")
    if "finetune" in sample:
        yield _line("trained on", _fate(sample["finetune"]))


def _text(label: str, text: Told) -> str:
    marks = [*text.get("marks", []), *(["cut at the token limit"] if text["finish"] == "length" else [])]
    drawn = f"\nas drawn: {text['raw']['text']}" if "raw" in text else ""
    return _line(label, text["text"] + (f"  [{', '.join(marks)}]" if marks else "") + drawn)


def _principle(principle: Told) -> Iterator[str]:
    yield _line("principle", f"{principle['id']} ({principle['hash']}, constitution {principle['constitution']})")
    yield _line("", principle["statement"] if "statement" in principle else f"no text: {principle['problem']}")


def _by(by: Told) -> Iterator[str]:
    if "source" in by:
        yield _line("given by", str(by["source"]) + (f", line {by['line']}" if "line" in by else ""))
        return
    drawn = ", ".join(f"{name} {value}" for name, value in by.get("sampling", {}).items())
    yield _line(
        "drawn by", f"model {str(by.get('model'))[:16]}, seed {by.get('seed')}" + (f", {drawn}" if drawn else "")
    )


def _fate(fate: Told) -> str:
    """What supervised training made of a text."""
    if fate.get("unfinished"):
        return "not yet: finetune has not finished"
    if "left_out" in fate:
        return f"no, left out: {fate['left_out']}"
    cut = "; it was cut, so it teaches no end" if fate["cut"] else ""
    return f"yes, by finetune, {_steps(fate['steps'])}: model {fate['model'][:16]}{cut}"


def _steps(steps: list[dict[str, int]]) -> str:
    return ", ".join(f"epoch {one['epoch']} step {one['step']}" for one in steps)


def _pair(pair: Told) -> Iterator[str]:
    yield ""
    yield f"{printable(pair['id'])}: two answers, and which is better"
    yield from _by(pair["pairs_by"])
    yield _text("a", pair["a"])
    yield _text("b", pair["b"])
    label = pair["label"]
    if label is None:
        yield _line("label", "none yet")
        return
    p_a = f"none: {label['abstained']}" if label["p_a"] is None else f"p(a is better) = {label['p_a']:.4f}"
    clamped = f" ({label['unclamped']:.4f} before the clamp)" if "unclamped" in label else ""
    judge = f", judge {label['by']['model'][:16]}" if "model" in label["by"] else ", given"
    yield _line("label", f"{p_a}{clamped}{judge}")
    if label.get("shots"):
        yield _line("examples", ", ".join(map(str, label["shots"])))
    for reading in label["readings"]:
        yield from _reading(reading)
    for stage in ("reward", "dpo"):
        if stage in pair:
            yield _line(stage, _use(pair[stage]))


def _reading(reading: Told) -> Iterator[str]:
    if "principle" in reading:
        yield from _principle(reading["principle"])
    if reading.get("p_a") is None:
        yield _line("", f"abstained: {reading['abstained']}")
        return
    for order, thoughts in reading.get("thoughts", {}).items():
        for thought in thoughts:
            yield _text(f"{order[0]} first", thought)
    sides = [name for name in ("a_first", "b_first") if "p_first" in reading.get(name, {})]
    shown = [f"p(first) {reading[side]['p_first']:.4f} with {side[0]} first" for side in sides]
    yield _line("", ", ".join([f"p_a {reading['p_a']:.4f}", *shown, f"weight {reading['weight']:g}"]))


def _use(use: Told) -> str:
    told = f"{use['use']}, {_steps(use['steps'])}" if "steps" in use else use["use"]
    told += ", the label rounded to 0 or 1" if "steps" in use and "hard_labels" in use else ""
    return f"{told}{': ' + use['reason'] if 'reason' in use else ''}; model {use['model'][:16]}"


def _episode(episode: Told) -> Iterator[str]:
    yield ""
    yield f"{episode['id']}: an episode of PPO"
    yield _line("answer", episode["text"] + ("" if episode["ended"] else "  [no end]"))
    raw = ", ".join(f"{score:.4f}" for score in episode["raw"])
    scorers = [f"judge {episode['judge'][:16]}"] if "judge" in episode else []
    scorers += [f"reward model {hash[:16]}" for hash in episode.get("reward_models", [])]
    said = ", ".join(scorers) or "a reward model that ppo names when it has finished"
    yield _line("score", f"{episode['score']:.4f}; as it came {raw}, from {said}")
    for reading in episode.get("rating", {}).get("readings", []):
        yield from _principle(reading["principle"])
        mark = f"mark {reading['mean']:.4f}" if reading["mean"] is not None else f"abstained: {reading['abstained']}"
        yield _line("", f"{mark}, weight {reading['weight']:g}")
    yield _line("drawn by", f"policy weights {episode['weights'][:16]}, seed {episode['seed']}")
    if "learned_by" in episode:
        learners, model = " and ".join(episode["learned_by"]), episode["model"][:16]
        yield _line("trained on", f"yes, by ppo ({learners}): model {model}" if learners else "no: the run was stopped")
    else:
        yield _line("trained on", "not yet: ppo has not finished")
