"""A tuned model as a file of another program, compared with the model before it has its name."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rwkv_peft.checkpoint.folder import CONFIG
from rwkv_peft.checkpoint.older import LegacyAdapterHints, old_method
from rwkv_peft.checkpoint.records import require_sums
from rwkv_peft.checkpoint.state import holds_state_alone
from rwkv_peft.data.templates import Template
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.exports.check import compare
from rwkv_peft.exports.formats import FORMATS, Format, Job
from rwkv_peft.exports.parts import (
    STATE_DTYPES,
    STATE_ENDINGS,
    make_lora,
    read_time_states,
    write_lora,
    write_states,
)
from rwkv_peft.exports.source import Source, open_source
from rwkv_peft.exports.texts import MODELFILE, MODELFILE_MARK, write_modelfile
from rwkv_peft.guard import require_free
from rwkv_peft.writing import atomic_file, atomic_folder

# by which RWKV-Runner tells models of music from others, anywhere in a path
RUNNER_MARKS = ("midi", "abc")
# of files that a folder is not named like
FILE_ENDINGS = (*(kind.ending for kind in FORMATS.values() if kind.ending), ".safetensors")
# nats a token that rounding to a type costs at most, on models as they are trained
EXPECTED_KL = {
    "fp32": 1e-8, "keep": 1e-8, "fp16": 1e-4, "bf16": 3e-3, "q8_0": 3e-3, "q5_1": 0.1, "q5_0": 0.1,
    "q4_1": 0.3, "q4_0": 0.3,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        files: written ones, the export itself first.
        checked: a line on the comparison with the model.
        remarks: what to know of the file.
    """

    files: list[Path]
    checked: str
    remarks: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """All of it for a person."""
        wrote = f"wrote {', '.join(map(str, self.files))}"
        return [wrote, f"check: {self.checked}", *(f"note: {remark}" for remark in self.remarks)]


def export(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    dtype: str = "",
    base_model: str | Path = "",
    template: Template,
    hints: LegacyAdapterHints | None = None,
    merge: bool = True,
    force: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a model as a file of another program.

    Args:
        source: a model's file, a state's, or an adapter.
        output: the file or folder to write; named after the source if empty.
        to: a name of `FORMATS`.
        dtype: one of the format's, its first if empty.
        base_model: the model that an adapter was trained on; empty for all else.
        template: how turns are written, for formats that hold it.
        merge: False writes a LoRA as a file of its own, for 'st'.
        force: take an adapter that was trained on another base.
    Raises:
        ConfigError: the output cannot be written, or the format holds no such dtype or version.
        CheckpointError: a file cannot be read, a value does not fit the dtype, or the file does
            not answer as the model does. Nothing is left of it then.
    """
    kind, source = FORMATS[to], Path(source)
    if source.is_file() and holds_state_alone(source):
        other_dtype = dtype not in ("", STATE_DTYPES.get(to))
        asked = {"--base_model": base_model, "--merge 0": not merge, "--dtype": other_dtype}
        unused = [flag for flag, is_given in asked.items() if is_given]
        return _export_state(source, output, to, overwrite, unused)
    _require_base(source, base_model)
    dtype = _choose_dtype(kind, to, dtype)
    inputs = [source, base_model] if base_model else [source]
    kept = "" if dtype == "keep" else f"-{dtype}"
    # a merged adapter is a whole model
    stem = safe_stem(source).removesuffix("-adapter" if merge else "")
    output = Path(output or f"{stem}{kept}{kind.ending or f'-{to}'}")
    _require_output(output, kind, inputs, overwrite)
    require_sums(*inputs)
    hints = hints or LegacyAdapterHints()
    if not merge:
        if not base_model or to != "st":
            raise ConfigError("--merge 0 is for adapters and --to st: leave it out")
        return _export_lora(source, base_model, output, hints, force)
    opened = open_source(source, base_model, hints, force)
    _require_version(opened, kind, to)
    if opened.states and to not in STATE_ENDINGS:
        raise ConfigError(
            f"{source} holds a learned state, for which --to {to} has no place, and without it "
            f"answers are not those of the tune: use --to {' or '.join(STATE_ENDINGS)}"
        )
    job = Job(opened, dtype, template, output.stem)
    checked = _write_checked(output, kind, job)
    files = [output, *_write_modelfile(output, template)] if to == "gguf" else [output]
    return ExportReport(files, checked, list_remarks(to, output))


def _require_base(source: Path, base_model: str | Path) -> None:
    """Sees that an adapter comes with its base, and nothing else with one."""
    is_adapter = (source / CONFIG).is_file() or bool(old_method(source))
    if base_model and not is_adapter:
        raise CheckpointError(f"{source} is a whole model: leave --base_model out")
    if is_adapter and not base_model:
        raise CheckpointError(
            f"{source} is an adapter, and needs the model that it was trained on: give "
            "--base_model model.pth"
        )


def _write_checked(output: Path, kind: Format, job: Job) -> str:
    """Writes an export that answers as the model does, and gives a line on it."""
    source = job.source
    with ExitStack() as stack:
        if kind.ending:
            file = stack.enter_context(atomic_file(output))
            kind.write(file, job)
            file.flush()
            written = Path(file.name)
        else:
            written = stack.enter_context(atomic_folder(output))
            kind.write(written, job)
        exported = {n: x for n, x in kind.read(written).items() if n not in source.states}
        is_kept = job.dtype == "keep" and source.addition is not None
        rounded = _coarsest(source) if is_kept else job.dtype
        return compare(source.model(), exported, EXPECTED_KL[rounded], rounded)


def _write_modelfile(output: Path, template: Template) -> list[Path]:
    modelfile = output.with_name(MODELFILE)
    with atomic_file(modelfile, "w") as text:
        text.write(write_modelfile(output, template))
    return [modelfile]


def _coarsest(source: Source) -> str:
    """The dtype of a model's file that rounds most."""
    coarse = max(set(source.dtypes.values()), key=lambda dtype: torch.finfo(dtype).eps)
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(coarse, "fp32")


def _export_state(
    path: Path, output: str | Path, to: str, overwrite: bool, unused: Sequence[str]
) -> ExportReport:
    states = read_time_states(path, to)
    if unused:
        raise ConfigError(
            f"{path} is a learned state, which --to {to} writes by itself and in "
            f"{STATE_DTYPES[to]}: leave {unused[0]} out"
        )
    output = Path(output or f"{safe_stem(path)}-state{STATE_ENDINGS[to]}")
    _require_ending(output, STATE_ENDINGS[to])
    require_free(output, inputs=[path], overwrite=overwrite)
    require_sums(path)
    with atomic_file(output) as file:
        checked = write_states(file, states, to)
    return ExportReport([output], checked, list_remarks(to, output))


def _export_lora(
    path: Path, base_model: str | Path, output: Path, hints: LegacyAdapterHints, force: bool
) -> ExportReport:
    tensors, alpha = make_lora(path, base_model, hints, force)
    with atomic_file(output) as file:
        checked = write_lora(file, tensors)
    remark = f"in Ai00's Config.toml give this LoRA alpha = {alpha:g}"
    return ExportReport([output], checked, [remark])


def safe_stem(path: Path) -> str:
    """The name of an export: the source's, without what RWKV-Runner takes as a mark."""
    path = path.resolve()
    stem, parent = path.name if path.is_dir() else path.stem, path.parent.name
    # every run has a rwkv-0
    if stem.startswith("rwkv-") and parent:
        stem = f"{parent}-{stem}"
    for word in RUNNER_MARKS:
        stem = re.sub(word, "-".join(word), stem, flags=re.IGNORECASE)
    return stem


def list_remarks(to: str, output: Path) -> list[str]:
    """What to know of an exported file."""
    remarks = []
    marks = [word for word in RUNNER_MARKS if word in str(output.resolve()).lower()]
    if marks and to in ("pth", "st", "bin", "gguf"):
        remarks.append(
            f"the path holds '{marks[0]}', by which RWKV-Runner takes a model for one of music: "
            "move it for that program"
        )
    if to == "gguf":
        remarks.append(
            "token 0 ends an answer, and a blank line does not; in llama.cpp, LM Studio and "
            "koboldcpp set the stop texts that stand in the Modelfile"
        )
    return remarks


def _require_ending(output: Path, ending: str) -> None:
    # a folder's name may have any dot, as those of official models do: rwkv7-g1-1.5b
    is_wrong = output.suffix != ending if ending else output.suffix in FILE_ENDINGS
    if is_wrong:
        wanted = f"a name that ends in {ending}" if ending else "a folder's name"
        raise ConfigError(f"--output {output}: {wanted} is needed here")


def _choose_dtype(kind: Format, to: str, dtype: str) -> str:
    if dtype and dtype not in kind.dtypes:
        raise ConfigError(f"--dtype {dtype}: --to {to} holds {', '.join(kind.dtypes)}")
    return dtype or kind.dtypes[0]


def _require_version(source: Source, kind: Format, to: str) -> None:
    if source.model_config.version not in kind.versions:
        raise CheckpointError(
            f"--to {to} is for {', '.join(kind.versions)}, as {kind.programs} open no other, and "
            f"this model is {source.model_config.version}"
        )


def _require_output(
    output: Path, kind: Format, inputs: Sequence[str | Path], overwrite: bool
) -> None:
    _require_ending(output, kind.ending)
    if kind.ending == ".gguf" and not output.name.isprintable():
        raise ConfigError(f"--output {output}: a Modelfile cannot name it: choose another name")
    owned = None if kind.ending else kind.owned
    require_free(output, inputs=inputs, overwrite=overwrite, owned=owned)
    if kind.ending == ".gguf":
        modelfile = output.with_name(MODELFILE)
        # one that an earlier export wrote is replaced
        is_ours = overwrite or _is_modelfile(modelfile)
        require_free(modelfile, inputs=inputs, overwrite=is_ours, flag="the Modelfile")


def _is_modelfile(path: Path) -> bool:
    """Whether a file is a Modelfile of an earlier export."""
    mark = MODELFILE_MARK.encode()
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(mark)) == mark
