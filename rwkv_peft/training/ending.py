"""What is said when a run has ended: what it learned, and what to do with its files."""

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from rwkv_peft.checkpoint.pth import infer_model_config, read_weights
from rwkv_peft.checkpoint.report import REPORT, TOLERABLE
from rwkv_peft.errors import RwkvPeftError
from rwkv_peft.exports.formats import FORMATS
from rwkv_peft.printing import duration
from rwkv_peft.training.metrics import LOSSES
from rwkv_peft.training.recorder import Result

# characters of an answer
SHOWN = 300
# formats of exports that the end of a run names, with programs that open them
PROGRAMS = {
    "gguf": "llama.cpp, Ollama, LM Studio, koboldcpp",
    "st": "Ai00",
    "bin": "rwkv.cpp",
    "hf-fla": "flash-linear-attention",
}
# steps at each end of a run whose losses are averaged
NUM_STEPS = 10


def describe_ending(result: Result, seconds: float) -> Iterator[str]:
    """What a run came to, in lines for a person."""
    line = f"done in {duration(seconds)}, steps: {result.steps}"
    if losses := read_losses(result.proj_dir):
        line += f"; loss {losses[0]:.4f} at the beginning and {losses[1]:.4f} at the end"
    measured = [x.loss for x in result.evaluations if x.loss is not None]
    if len(measured) > 1:
        line += f"; on what was kept aside {measured[0]:.4f} before and {measured[-1]:.4f} after"
    yield line
    if (answers := result.answers) and answers.after:
        yield f"the first question of the data: {_shorten(answers.question)}"
        if answers.before:
            yield f"  before: {_shorten(answers.before)}"
        yield f"  after:  {_shorten(answers.after)}"
    yield from _describe_files(result)
    yield from _describe_rounding(result)


def read_losses(folder: Path) -> tuple[float, float] | None:
    """Mean loss of a run's first steps, and of its last; None of fewer than two steps."""
    try:
        lines = (folder / LOSSES).read_text(encoding="utf-8").splitlines()
        count = min(NUM_STEPS, len(lines) // 2)
        parts = [[json.loads(x)["loss"] for x in y] for y in (lines[:count], lines[-count:])]
    except (OSError, ValueError, KeyError):
        return None
    return (sum(parts[0]) / count, sum(parts[1]) / count) if count else None


def _describe_files(result: Result) -> Iterator[str]:
    settings, weights, adapter = result.settings, result.weights, result.adapter
    if weights or adapter:
        yield f"talk with it: {_command('chat', result.proj_dir)}"
    if weights and settings and settings.peft == "state":
        yield f"  {weights}: the state alone, for RWKV-Runner and the rwkv package beside its base"
        if settings.train_type == "fullstate":
            yield (
                "  it also holds the vectors before the first token, which other programs do not "
                "read: they want plain states, of --train_type state"
            )
        else:
            yield from _describe_exports(result, ["st"])
    elif weights:
        yield (
            f"  {weights}: the whole tuned model, for RWKV-Runner, the rwkv package and all that "
            "opens its base"
        )
    if adapter:
        yield (
            f"  {adapter}: the adapter alone, small; on its base it is the same model: "
            f"{_command('chat', adapter)}, and {_command('train', adapter)} data.jsonl trains it "
            "further"
        )
    if (weights or adapter) and settings and settings.peft != "state":
        # the base may have gone meanwhile
        with suppress(RwkvPeftError, OSError):
            version = infer_model_config(read_weights(settings.load_model)).version
            held = [name for name in PROGRAMS if version in FORMATS[name].versions]
            yield from _describe_exports(result, held)
    if result.best and (best := result.best.weights or result.best.adapter):
        yield f"  {best}: the best evaluation: {_command('chat', best)}"


def _describe_exports(result: Result, formats: Sequence[str]) -> Iterator[str]:
    """The command that writes a result for each program that cannot open it as it is."""
    if formats:
        first, *others = formats
        line = f"  an export opens in {PROGRAMS[first]}: "
        line += _command("export", result.proj_dir, "--to", first)
        if others:
            named = ", ".join(f"{name} ({PROGRAMS[name]})" for name in others)
            line += f"; other programs: --to {named}"
        yield line


def _describe_rounding(result: Result) -> Iterator[str]:
    """What rounding took from a merged model, what that means and what to do, where it matters."""
    try:
        report = json.loads((result.proj_dir / REPORT).read_text(encoding="utf-8"))
        dtype, lost, finer = (report[n] for n in ("dtype", "relative_error", "relative_error_fp16"))
    except (OSError, ValueError, LookupError):
        return
    if not (result.adapter and result.weights and lost > TOLERABLE):
        return
    yield (
        f"rounding: {dtype} has so few digits that {lost:.0%} of what was learned is missing in "
        f"{result.weights}, which may answer otherwise than the adapter, where nothing is missing"
    )
    better, kept = ("fp16", f"{1 - finer:.0%}") if finer < lost / 2 else ("fp32", "all")
    file = result.proj_dir / f"merged-{better}.pth"
    options = ["--output", str(file), "--dtype", better]
    yield f"  a file with {kept} of it: {_command('merge', result.adapter, *options)}"


def _command(name: str, path: Path, *options: str) -> str:
    return shlex.join(["rwkv-peft", name, str(path), *options])


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[:SHOWN] + " …"
