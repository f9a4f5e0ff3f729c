"""metrics.jsonl and one console line per training step, which go on as one curve when a killed stage goes on."""

import json
import time
from pathlib import Path
from types import TracebackType

from bylaw.model.records import RecordWriter, read_records, repair, write_atomic


class Metrics:
    """Logs the steps of one stage. With `first_step` above 0, lines of steps from there on are cut: they come again.

    Of many ranks one `writes`.
    """

    def __init__(self, path: Path, stage: str, steps: int, first_step: int = 0, writes: bool = True) -> None:
        self.stage, self.steps, self.first_step, self.writes = stage, steps, first_step, writes
        self._writer = RecordWriter(path)
        if writes and path.exists():
            _cut(path, first_step)

    def __enter__(self) -> "Metrics":
        self._start = time.monotonic()
        if self.writes:
            self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writes:
            self._writer.__exit__(kind, error, trace)

    def log(self, step: int, values: dict[str, float], shown: dict[str, float]) -> None:
        """Append `values` for `step` (0-based) to the file, and print those `shown` and the time left in one line."""
        if not self.writes:
            return
        self._writer.write([{"step": step, **values}])
        left = (time.monotonic() - self._start) / (step + 1 - self.first_step) * (self.steps - step - 1)
        facts = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        minutes, seconds = divmod(round(left), 60)
        print(f"{self.stage} {step + 1}/{self.steps}  {facts}  {minutes}:{seconds:02d} left", flush=True)


def _cut(path: Path, first_step: int) -> None:
    repair(path)
    kept = [record for record in read_records(path) if record["step"] < first_step]
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
