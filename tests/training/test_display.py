"""The line of progress, and the word before the first step."""

import io
import re
import sys
import time

import pytest

from rwkv_peft.language import choose_language
from rwkv_peft.printing import count_columns, duration
from rwkv_peft.training import display as display_module
from rwkv_peft.training.display import Display
from rwkv_peft.training.metrics import StepRecord

CHINESE = ("步", "损失", "学习率", "token/秒", "还需")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, loss: float, *, seconds: float = 0.1, memory: int = 0) -> StepRecord:
    return StepRecord(step, 0, loss, 2e-4, 1.0, 300, 100, seconds, 3.0, memory)


LINE = re.compile(
    r"step (\d+)/(\d+)  loss ([\d.]+)  lr 2\.00e-04  ([\d,]+) tokens/s(  [\d.]+ GiB)?  (.+) left"
)


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_each_step_is_one_line_of_the_same_words(
    stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(display_module, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setenv("COLUMNS", "200")
    with Display() as display:
        display.begin(40)
        for step in range(1, 41):
            display.update(record(step, 2.0 if step % 2 else 4.0, memory=3 << 30))
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    found = LINE.findall(shown)
    step, total, loss, rate, memory, left = found[-1]
    assert (step, total, rate, memory, left) == ("40", "40", "3,000", "  3.0 GiB", "0 s")
    # a step's loss is 2 or 4, and a person sees where it goes
    assert 2.9 < float(loss) < 3.1
    assert "left" in shown and "kt/s" not in shown and shown.count("0:00:") == 0


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(
    ("columns", "shown", "gone"),
    [
        (120, "━ step loss lr tokens/s GiB left", ""),
        (80, "step loss tokens/s GiB left", "lr"),
        (60, "step loss tokens/s left", "lr GiB"),
        (48, "step loss left", "lr GiB tokens/s"),
        (40, "step left", "loss GiB"),
    ],
)
def test_a_narrow_terminal_has_what_matters_most_whole(
    columns: int, shown: str, gone: str, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    choose_language(language)
    try:
        with Display() as display:
            display.begin(12345)
            display.update(record(1234, 2.0, seconds=1.0, memory=21 << 30))
    finally:
        choose_language("en")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sys.stderr.getvalue())  # type: ignore[attr-defined]
    line = text.strip().splitlines()[-1].rpartition("\r")[2]
    assert count_columns(line) <= columns and "…" not in line
    words = dict(zip(["step", "loss", "lr", "tokens/s", "left"], CHINESE, strict=True))
    for part in shown.split():
        assert (words.get(part, part) if language == "zh" else part) in line, part
    for part in gone.split() if language == "en" else ():
        assert f"{part} " not in line, part


def test_a_line_above_the_bar_is_not_broken_by_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "40")
    with Display() as display:
        display.begin(3)
        display.line("epoch 0: loss 2.0, saved a/very/long/path/" + "x" * 50)
    assert f"saved a/very/long/path/{'x' * 50}\n" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_the_mean_is_that_of_trained_tokens_and_forgets_the_beginning() -> None:
    mean = display_module.Mean()
    assert mean.value == 0
    mean.add(9.0 * 10, 10)
    assert mean.value == 9.0
    mean.add(1.0 * 90, 90)
    assert mean.value == pytest.approx((0.95 * 90 + 90) / (0.95 * 10 + 90))
    for _ in range(200):
        mean.add(5.0 * 7, 7)
    assert mean.value == pytest.approx(5.0, abs=1e-3)


def test_the_time_left_is_counted_without_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 102.0, 104.0])
    monkeypatch.setattr(display_module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(display_module, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Display() as display:
        display.begin(33)
        # compiles for 100 seconds
        display.update(record(1, 1.0, seconds=100.0))
        display.update(record(2, 1.0, seconds=2.0))
        display.update(record(3, 1.0, seconds=2.0))
    left = [x[-1] for x in LINE.findall(sys.stderr.getvalue())]
    assert left == ["53 min", "62 s", "60 s"]


def test_what_lasts_before_the_first_step_is_said_and_what_does_not_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(display_module, "PATIENCE", 0.05)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Display() as display:
        display.tell("checking the files")
        display.tell("reading the data")
        deadline = time.monotonic() + 20
        while not sys.stderr.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        display.begin(2)
        display.tell("the first step")
        display.update(record(1, 1.0))
        time.sleep(0.1)
    text = sys.stderr.getvalue()
    assert text.startswith("reading the data …\nstep 1/2  ") and "first step" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (3599, "1 h 00 min"),
        (11100, "3 h 05 min"),
        (190_000, "2 d 4 h"),
    ],
)
def test_a_time_is_told_in_two_parts_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text
