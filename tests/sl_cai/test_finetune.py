"""Fine-tuning: which tokens are learned, by hand; what is left out, and counted; the loss against plain torch."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bylaw.model.packing import pack
from bylaw.model.records import Record, read_records
from bylaw.model.supervised import Example
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer
from bylaw.sl_cai.config import FinetuneConfig
from bylaw.sl_cai.finetune import finetune, helpful_examples, revision_examples

MakeModel = Callable[..., Transformer]
END = 0  # "</s>" of the tests' tokenizer


@pytest.fixture
def said(tokenizer: Tokenizer) -> Callable[..., Record]:
    """said(text, finish): a sampled text. One that ended by itself ends with the end token, unless `bare`."""

    def record(text: str, finish: str = "stop", bare: bool = False) -> Record:
        ids = tokenizer.encode(text)
        return {"text": text, "ids": ids if bare or finish == "length" else [*ids, END], "finish": finish}

    return record


def chain(prompt: str, *revisions: Record) -> Record:
    rounds = [{"round": n, "revision": revision} for n, revision in enumerate(revisions, 1)]
    return {"id": prompt, "prompt": [{"role": "user", "content": prompt}], "rounds": rounds}


def learned(example: Example, tokenizer: Tokenizer) -> tuple[str, str]:
    """What an example gives and what it teaches, spelled out."""
    parts = [[id for id, flag in zip(example.ids, example.learned, strict=True) if flag == side] for side in (0, 1)]
    assert sorted(example.learned) == example.learned  # the learned part is the end of the text, in one piece
    given, taught = (" ".join(map(tokenizer.token, ids)) for ids in parts)
    return given, taught


def test_exactly_the_revision_and_its_end_are_learned(tokenizer: Tokenizer, said: Callable[..., Record]) -> None:
    chains = [chain("w1 w2", said("w5"), said("w6 w7")), chain("w3", said("w8"))]
    examples, counts = revision_examples(chains, tokenizer)
    assert [learned(example, tokenizer) for example in examples] == [
        ("Human : w1 w2 Assistant :", "w5 </s>"),
        ("Human : w1 w2 Assistant :", "w6 w7 </s>"),
        ("Human : w3 Assistant :", "w8 </s>"),
    ]
    assert counts == {"revisions": 3, "empty_revisions": 0, "marked_revisions": 0, "cut_revisions": 0}


def test_the_very_ids_that_were_sampled_are_learned(tokenizer: Tokenizer) -> None:
    """Not those of the text: decoding leaves tokens out, and encoding it again could cut words otherwise."""
    ids = [1, 20, 1, 21, END]  # 1 is <unk>
    revision = {"text": tokenizer.decode(ids), "ids": ids, "finish": "stop"}
    [example], _ = revision_examples([chain("w1", revision)], tokenizer)
    assert example.ids[-5:] == ids and len(tokenizer.encode(revision["text"])) == 2


def test_a_cut_text_teaches_no_end_and_is_counted(tokenizer: Tokenizer, said: Callable[..., Record]) -> None:
    examples, counts = revision_examples([chain("w1", said("w5 w6", "length"), said("w7"))], tokenizer)
    assert learned(examples[0], tokenizer)[1] == "w5 w6"
    assert counts == {"revisions": 2, "empty_revisions": 0, "marked_revisions": 0, "cut_revisions": 1}


def test_a_revision_that_bears_a_named_mark_is_counted_and_not_learned(
    tokenizer: Tokenizer, said: Callable[..., Record]
) -> None:
    marked = said("w5") | {"marks": ["unchanged"]}
    chains = [chain("w1", marked, said("w6"))]
    examples, counts = revision_examples(chains, tokenizer, ("unchanged",))
    assert [learned(one, tokenizer)[1] for one in examples] == ["w6 </s>"] and counts["marked_revisions"] == 1
    assert len(revision_examples(chains, tokenizer, ("repetition",))[0]) == 2
    with pytest.raises(ValueError, match="leave_out"):
        FinetuneConfig(leave_out=("empty",))


def test_a_text_that_ended_at_a_stop_string_teaches_the_end_token(
    tokenizer: Tokenizer, said: Callable[..., Record]
) -> None:
    [example], _ = revision_examples([chain("w1", said("w5 w6", bare=True))], tokenizer)
    assert learned(example, tokenizer)[1] == "w5 w6 </s>"


def test_an_empty_text_is_counted_and_not_learned(tokenizer: Tokenizer, said: Callable[..., Record]) -> None:
    """To learn it would teach to say nothing."""
    examples, counts = revision_examples([chain("w1", said(""), said("", bare=True), said("w5"))], tokenizer)
    assert [learned(example, tokenizer)[1] for example in examples] == ["w5 </s>"]
    assert counts == {"revisions": 1, "empty_revisions": 2, "marked_revisions": 0, "cut_revisions": 0}
    sample = {"prompt": [{"role": "user", "content": "w1"}], "answer": said("")}
    assert helpful_examples([sample], tokenizer) == ([], {"helpful": 0, "empty_helpful": 1, "cut_helpful": 0})


def test_helpful_answers_given_and_sampled(tokenizer: Tokenizer, said: Callable[..., Record]) -> None:
    talk = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    samples = [{"prompt": talk, "given": "w4 w5"}, {"prompt": talk, "answer": said("w6", "length")}]
    examples, counts = helpful_examples(samples, tokenizer)
    given = "Human : w1 Assistant : w2 </s> Human : w3 Assistant :"  # the old answer is not learned
    assert [learned(example, tokenizer) for example in examples] == [(given, "w4 w5 </s>"), (given, "w6")]
    assert counts == {"helpful": 2, "empty_helpful": 0, "cut_helpful": 1}


def config(**settings: float) -> FinetuneConfig:
    return FinetuneConfig(**{"learning_rate": 1e-2, "batch_size": 2} | settings)  # type: ignore[arg-type]


def test_an_example_longer_than_the_context_is_left_out_and_counted(
    make_model: MakeModel, tokenizer: Tokenizer, said: Callable[..., Record], tmp_path: Path
) -> None:
    """The answers that a helpful data set gives have any length; a model has no positions past its context."""
    talk = [{"role": "user", "content": "w1"}]
    fits, long = ({"prompt": talk, "given": "w2 " * n} for n in (26, 27))  # and 5 of prompt, 1 of end: 32 and 33
    chains = [chain("w1", said("w5"))]
    counts = finetune(make_model(context=32), tokenizer, chains, [fits, long, long], tmp_path, config(), seed=0)
    assert {name: counts[name] for name in ("revisions", "helpful", "over_context", "steps", "tokens")} == {
        "revisions": 1,
        "helpful": 3,
        "over_context": 2,
        "steps": 1,
        "tokens": 32 + 7,
    }
    with pytest.raises(
        ValueError, match="0 chains and 1 helpful samples, all empty, marked, or longer than the model's context of 32"
    ):
        finetune(make_model(context=32), tokenizer, [], [long], tmp_path / "none", config(), seed=0)


def test_nothing_to_train_on_is_refused(
    make_model: MakeModel, tokenizer: Tokenizer, said: Callable[..., Record], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="1 chains and 0 helpful"):
        finetune(make_model(), tokenizer, [chain("w1", said(""))], [], tmp_path, config(), seed=0)
    assert not list(tmp_path.iterdir())


def dense_loss(model: Transformer, example: Example) -> torch.Tensor:
    """Summed over the learned tokens, with the logits of a whole text in float64."""
    hidden = model(pack([example.ids]))
    logits = torch.log_softmax((hidden @ model.head_weight.T).double(), dim=-1)
    return -sum(logits[i - 1, id] for i, id in enumerate(example.ids) if example.learned[i])  # type: ignore[return-value]


def test_the_loss_is_the_mean_over_learned_tokens_and_one_step_is_adamw_on_it(
    make_model: MakeModel, tokenizer: Tokenizer, said: Callable[..., Record], tmp_path: Path
) -> None:
    chains = [chain("w1 w2", said("w5"), said("w6 w7 w8", "length")), chain("w3", said("w9 w10"))]
    model, twin = make_model(seed=1), make_model(seed=1)
    finetune(model, tokenizer, chains, [], tmp_path, config(batch_size=3, micro_batch_tokens=12), seed=0)
    examples, _ = revision_examples(chains, tokenizer)
    loss = sum(dense_loss(twin, example) for example in examples) / 8  # learned: 2 + 3 + 3 tokens
    assert isinstance(loss, torch.Tensor)
    [line] = read_records(tmp_path / "metrics.jsonl")
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    loss.backward()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_training_makes_the_revisions_likely(
    make_model: MakeModel, tokenizer: Tokenizer, said: Callable[..., Record], tmp_path: Path
) -> None:
    chains = [chain(f"w{n}", said(f"w{n} w{n + 1}")) for n in range(8)]
    seen: list[tuple[int, int]] = []
    settings = config(epochs=10, batch_size=4)
    counts = finetune(
        make_model(), tokenizer, chains, [], tmp_path, settings, seed=0, show=lambda *step: seen.append(step)
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 4 and counts["last_loss"] == losses[-1]
    assert counts["steps"] == 20 and seen == [(n, 20) for n in range(20)]
