"""What a run shows while it goes on: one line of progress, and a word where something lasts."""

import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from rwkv_peft.language import translate
from rwkv_peft.printing import count_columns, duration, escape, print_text
from rwkv_peft.terminal import Unbreakable
from rwkv_peft.training.metrics import StepRecord

# without a terminal, at most one line of progress in so many seconds
PLAIN_INTERVAL = 10.0
# share of the past that each step leaves in a smoothed figure: some twenty steps count
KEPT = 0.95
# seconds after which it is said what is being done
PATIENCE = 2.0
# columns of the bar, and what a narrow terminal shows no more, the first first
BAR, DROPPED = 16, ("lr", "memory", "speed", "chunk", "loss")


class Mean:
    """A mean in which later values count more."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float, weight: float) -> None:
        """Takes the sum of so many values."""
        self._sum = KEPT * self._sum + value
        self._weight = KEPT * self._weight + weight

    @property
    def value(self) -> float:
        """The mean, 0 of nothing."""
        return self._sum / (self._weight or 1.0)


class Display:
    """Progress for a person: a bar on a terminal, a line now and then elsewhere, of the same words.

    Loss and tokens a second are means over some twenty steps; each step stands in loss_data.jsonl.
    Before the first step it says what is being done, where that lasts.
    """

    def __init__(self) -> None:
        self._total = self._done = 0
        self._parts: dict[str, str] = {}
        self._start = time.monotonic()
        self._last_line = self._last_chunk = 0.0
        self._loss, self._rate = Mean(), Mean()
        # the first step compiles, so that time is counted from its end
        self._first: tuple[float, int] | None = None
        self._stream = Unbreakable(sys.stderr)
        self._bar: Any = None
        self._columns: tuple[Any, ...] = ()
        self._timer: threading.Timer | None = None

    def tell(self, what: str) -> None:
        """Something else is being done from now on, of which a word comes if it lasts."""
        self._stop_waiting()
        self._timer = threading.Timer(PATIENCE, lambda: self.line(f"{translate(what)} …"))
        self._timer.daemon = True
        self._timer.start()

    def begin(self, total: int, done: int = 0) -> None:
        """The steps begin.

        Args:
            total: steps of the run.
            done: those that were taken before.
        """
        self._total, self._done = total, done
        if self._stream.isatty():
            self._bar = _rich_bar(total, done, self._stream)
            self._columns = self._bar.columns
            self._bar.start()

    def line(self, text: str) -> None:
        """Prints a line above the progress."""
        if self._bar is not None:
            shown = escape(translate(text), keeps="\n\t")
            # a path or a command that is broken in two cannot be copied
            self._bar.console.print(shown, markup=False, highlight=False, soft_wrap=True)
        else:
            print_text(text, file=self._stream)

    def update(self, record: StepRecord) -> None:
        """Shows a finished step."""
        self._stop_waiting()
        self._done, now = record.step, time.monotonic()
        self._loss.add(record.loss * record.trained_tokens, record.trained_tokens)
        self._rate.add(record.tokens, record.t_cost)
        self._parts = self._summarise(record, self._seconds_left(record, now))
        if self._bar is not None:
            self._show(record.step)
        elif now - self._last_line >= PLAIN_INTERVAL or record.step == self._total:
            self._last_line = now
            self.line("  ".join(map(translate, self._parts.values())))

    def show_chunk(self, done: int, total: int) -> None:
        """Shows how many of its chunks a micro-batch in work has been through."""
        if total == 1:
            return
        if self._bar is not None:
            self._show(self._done, f"chunk {done}/{total}")
            return
        now = time.monotonic()
        # in lines of their own, so that none of a step is left out for them
        if now - max(self._start, self._last_line, self._last_chunk) >= PLAIN_INTERVAL:
            self._last_chunk = now
            self.line(f"step {self._done + 1}/{self._total}  chunk {done}/{total}")

    def _seconds_left(self, record: StepRecord, now: float) -> float:
        if self._first is None:
            self._first = now, record.step
        since, step = self._first
        seconds = (now - since) / (record.step - step) if record.step > step else record.t_cost
        return seconds * (self._total - record.step)

    def _summarise(self, record: StepRecord, seconds_left: float) -> dict[str, str]:
        parts = {
            "step": f"step {record.step}/{self._total}",
            "loss": f"loss {self._loss.value:.4f}",
            "lr": f"lr {record.lr:.2e}",
            "speed": f"{self._rate.value:,.0f} tokens/s",
        }
        if record.peak_memory:
            parts["memory"] = f"{record.peak_memory / 2**30:.1f} GiB"
        return {**parts, "left": f"{duration(seconds_left)} left"}

    def _show(self, step: int, chunk: str = "") -> None:
        """Shows what there is room for in the bar's line."""
        parts = {**({"chunk": chunk} if chunk else {}), **self._parts}
        said = {name: translate(text) for name, text in parts.items()}
        columns = self._bar.console.width
        for name in DROPPED:
            if _width(said.values()) <= columns:
                break
            said.pop(name, None)
        is_wide = _width(said.values()) + BAR + 1 <= columns
        self._bar.columns = self._columns if is_wide else self._columns[1:]
        self._bar.update(0, completed=step, text="  ".join(said.values()))

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop_waiting()
        if self._bar is not None:
            self._bar.stop()


def _width(parts: Iterable[str]) -> int:
    """Columns that they take on a terminal, where a Chinese letter has two."""
    return count_columns("  ".join(parts))


def _rich_bar(total: int, done: int, stream: Unbreakable) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        BarColumn(bar_width=BAR),
        TextColumn("{task.fields[text]}", markup=False),
        console=Console(file=stream),  # type: ignore[arg-type]
    )
    bar.add_task("", total=total, completed=done, text=f"step {done}/{total}")
    return bar
