"""What the tests of PPO share."""

from collections.abc import Callable

import pytest
from ppo_task import MakeTask, Task

from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Transformer


@pytest.fixture
def make_task(make_model: Callable[..., Transformer], tokenizer: Tokenizer) -> MakeTask:
    """make_task(value): a tiny task, with a "separate" or a "shared" value."""
    return lambda value="separate": Task(make_model, tokenizer, value)
