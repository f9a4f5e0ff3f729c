"""The engine samples with the adapter in use, and what it keeps between calls is of that adapter alone."""

import copy

import torch
from naive_engine import tiny_model
from test_lora import adapted, randomise_adapter

from bylaw.model.engine import Engine, Query, Request
from bylaw.model.engine.weights import weight_version
from bylaw.model.lora import adapter_parameters, add_adapter, merge, use_adapter
from bylaw.model.lora_settings import LoraSettings

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 12], [13]]


def greedy(engine: Engine) -> list[list[int]]:
    asked = [Request(prompt=p, max_tokens=12, seed=0, request=i, temperature=0.0) for i, p in enumerate(PROMPTS)]
    return [completion.ids for completion in engine.generate(asked)]


def test_the_engine_samples_with_the_adapter_in_use_and_its_cache_never_mixes_them() -> None:
    trunk = adapted("policy", "value")
    expected: dict[str | None, tuple[list[list[int]], list[list[float]]]] = {}
    queries = [Query(prompt, [[4, 5], [6]]) for prompt in PROMPTS]
    for name in (None, "policy", "value"):
        merged = tiny_model() if name is None else copy.deepcopy(trunk)
        if name is not None:
            merge(merged, name)
        expected[name] = greedy(Engine(merged)), Engine(merged).score(queries)
    assert len({str(ids) for ids, _ in expected.values()}) == 3, "adapters too small to tell anything"
    engine = Engine(trunk)
    for name in ("policy", None, "value", "policy", "policy"):  # each after a call that has filled the cache
        with use_adapter(trunk, name):
            ids, scores = greedy(engine), engine.score(queries)
        assert ids == expected[name][0], name
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected[name][1]), atol=1e-3, rtol=0)


def test_the_version_is_of_what_a_forward_pass_reads() -> None:
    trunk = adapted("policy", "value")
    with torch.no_grad():  # twins but for the name
        for one, other in zip(*(adapter_parameters(trunk, n).values() for n in ("policy", "value")), strict=True):
            other.copy_(one)

    def version(name: str | None) -> bytes:
        with use_adapter(trunk, name):
            return weight_version(trunk)

    first = {name: version(name) for name in (None, "policy", "value")}
    assert len(set(first.values())) == 3 and first[None] == weight_version(tiny_model())
    with torch.no_grad():
        trunk.get_parameter("blocks.1.down.lora_policy.B")[0, 0] += 1e-6
    assert version("policy") != first["policy"]
    assert version(None) == first[None] and version("value") == first["value"], "an idle adapter is not read"
    twin = tiny_model()
    add_adapter(twin, "policy", LoraSettings(rank=3, alpha=7.0), seed=0)
    randomise_adapter(twin, "policy")
    with use_adapter(twin, "policy"):
        assert weight_version(twin) != first["policy"], "the scale is no tensor, and counts"
