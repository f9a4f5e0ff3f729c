"""Scripts on their way: what each asks next, and the rows in which its texts are continued."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bylaw.model.engine.prefix import Path, length
from bylaw.model.engine.request import Request, Script


@dataclass(eq=False)
class Job:
    """One script. Once it is `done`, `result` is what it returned, or `error` what it ended with instead."""

    index: int
    script: Script[Any]
    result: Any = None
    error: ValueError | None = None
    done: bool = False

    def send(self, answer: Any) -> Any:
        """Answer what it asked (None to begin); returns what it asks next, None if it is done."""
        return self._go(lambda: self.script.send(answer))

    def refuse(self, error: ValueError) -> Any:
        """Tell it that what it asked cannot be done."""
        return self._go(lambda: self.script.throw(error))

    def _go(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except StopIteration as end:
            self.result = end.value
        except ValueError as error:
            self.error = error
        self.done = True
        return None


@dataclass(eq=False)
class Row:
    """A text that is continued: `tokens` are the prompt and what was drawn and read back."""

    job: Job
    request: Request
    span: int  # the most tokens that it can come to have
    keys: list[bytes]  # of the prompt's pages
    tokens: list[int] = field(init=False)
    logprobs: list[float] = field(default_factory=list)
    drawn: int = 0  # draws begun
    slot: int = -1
    path: Path = ()  # the segments that it stands on; the tokens behind them are its own
    kept: int = 0  # leading tokens whose keys and values it has, while it waits for its next turn
    ticket: int = 0  # when it was admitted
    parked: bool = False  # in its slot, waiting for its next turn
    epoch: int = 0  # draws begun in an earlier one are void

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def ids(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def size(self) -> int:
        """Tokens with the newest, whether it is known yet or not."""
        return len(self.request.prompt) + self.drawn

    @property
    def own(self) -> int:
        """Own tokens that it must have room for."""
        return max(self.size, len(self.tokens)) - length(self.path)

    @property
    def own_span(self) -> int:
        return self.span - length(self.path)

    @property
    def drawing(self) -> bool:
        """Whether there is a token left to draw."""
        return not self.parked and self.size < self.span

    def turn(self, request: Request, span: int, keys: list[bytes]) -> None:
        """Wait in its slot for the next turn, with what the new prompt has in common with what is kept."""
        self.kept = self.common(request)
        self.request, self.span, self.keys = request, span, keys
        self.tokens, self.logprobs = list(request.prompt), []
        self.drawn, self.parked = 0, True
        self.epoch += 1

    def common(self, request: Request) -> int:
        """Leading tokens of the new prompt that are kept; its last is always computed anew."""
        most = min(len(self.tokens) - 1, len(request.prompt) - 1)
        if list(request.prompt[:most]) == self.tokens[:most]:
            return most
        return next(i for i in range(most) if request.prompt[i] != self.tokens[i])

    def again(self) -> None:
        """Give up its slot; its draws go on where they were."""
        self.slot, self.path, self.parked, self.kept = -1, (), False, 0
        self.drawn = len(self.ids)
        self.epoch += 1
