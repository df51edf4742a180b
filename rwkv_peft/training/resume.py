"""Going on with a run that stopped: which checkpoint, whether it is the same run, and its state."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_peft.checkpoint.adapter import saved_method
from rwkv_peft.checkpoint.fingerprint import fingerprint
from rwkv_peft.checkpoint.tree import find_damage, read_tree, read_values
from rwkv_peft.config import OPEN_AT_ZERO, DataConfig, TrainConfig
from rwkv_peft.data.documents import Documents
from rwkv_peft.data.fingerprint import hash_documents
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.printing import counted
from rwkv_peft.training.checkpoints import FOLDER, find_versions, list_checkpoints
from rwkv_peft.training.choose import with_method
from rwkv_peft.training.folder import find_holder, read_settings
from rwkv_peft.training.form import foreign_in_one_line, require_form
from rwkv_peft.training.metrics import LOGS, LogPlaces
from rwkv_peft.training.run_state import Run
from rwkv_peft.training.saved import Saved

AUTO = "auto"
# settings that change no bit of what is learned: where and when files are written, how many threads
# help, and what the hashes of base and data tell better than their names
HARMLESS = {
    "proj_dir",
    "overwrite",
    "resume",
    "resume_changes",
    "save_every_steps",
    "save_every_minutes",
    "keep",
    "on_save_error",
    "check_files",
    "epoch_save",
    "merge",
    "val_prompts",
    "report_to",
    "wandb",
    "force",
    "strategy",
    "num_workers",
    "load_model",
    *(f.name for f in fields(DataConfig)),
}
# those that say which documents there are
_DATA = [f.name for f in fields(DataConfig) if f.name not in ("data_cache", "prepare_workers")]


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run goes on.

    Attributes:
        config: with what was left open as the run had it.
        folder: of the checkpoint; None: the run begins again, having made none.
        values: of the checkpoint, tensors included; only `settings` without one.
        lines: what a person should read before it goes on; the log is that of a run that never
            stopped.
    """

    config: TrainConfig
    folder: Path | None
    values: Mapping[str, Any]
    lines: list[str] = field(default_factory=list)

    @property
    def places(self) -> LogPlaces:
        """Where the logs stood."""
        if self.folder is None:
            return LogPlaces(Path(self.config.proj_dir), dict.fromkeys(LOGS, 0))
        return LogPlaces(_spell_out(self.folder).parent.parent, self.values["logs"])

    def require_same(
        self, weights: Mapping[str, Tensor], documents: Documents, held_out: Documents | None
    ) -> None:
        """Raises ConfigError if these are not the base and the documents of the run."""
        self._require_base(weights)
        chooses = ["val_split", "epoch_unit"]
        if self.config.epoch_unit == "samples":
            chooses.append("epoch_steps")
        self._require_data("data", documents, "data_file", chooses)
        if held_out is not None:
            self._require_data("held_out", held_out, "val_file", ["val_file", "val_split"])

    def _require_base(self, weights: Mapping[str, Tensor]) -> None:
        now, then = fingerprint(weights), self.values.get("base")
        if then not in (None, now) and "load_model" not in self.config.resume_changes:
            raise ConfigError(
                f"--resume {self.folder}: {self.config.load_model} is another base than the run's, "
                f"{self.values['settings']['load_model']} as it was (fingerprint {now[:8]}, was "
                f"{then[:8]}): give that file, or allow it: --resume_changes load_model"
            )

    def _require_data(
        self, what: str, documents: Documents, file: str, chooses: Sequence[str]
    ) -> None:
        """Raises ConfigError if documents are not those that a checkpoint has the hash of.

        Args:
            file: the setting that names their files.
            chooses: further settings that say which documents they are.
        """
        then = self.values.get(what)
        if then is None or then == hash_documents(documents):
            return
        settings, config = self.values["settings"], asdict(self.config)
        names = [*_DATA, *chooses]
        changed = [n for n in names if n in settings and settings[n] != config[n]]
        # a file that was moved explains nothing
        changed = [n for n in changed if n != file] or changed
        if set(changed or names) & set(self.config.resume_changes):
            return
        why = "a file of it was changed, or another version of the program reads it otherwise"
        if changed:
            why = _name_changes({n: (config[n], settings[n]) for n in changed})
        which = "the data is" if what == "data" else "the data of evaluations is"
        raise ConfigError(
            f"--resume {self.folder}: {which} other than the run's: {why}. Give it as it was, "
            f"or allow it: --resume_changes {','.join(changed or [file])}"
        )

    def restore(self, run: Run) -> None:
        """Takes up the run's state."""
        if self.folder is None:
            self.lines.append("resume: there is no checkpoint yet, the run begins again")
            return
        state = self.values["run"]
        with foreign_in_one_line(self.folder):
            saved = {n: tuple(x.shape) for n, x in state["optimizer"]["values"].items()}
        here = {n: tuple(x.shape) for n, x in run.target.parameters.items()}
        if saved != here:
            differ = [n for n in {**here, **saved} if saved.get(n) != here.get(n)]
            raise ConfigError(
                f"--resume {self.folder}: {differ[0]} is {here.get(differ[0], 'not trained')} and "
                f"was {saved.get(differ[0], 'not trained')}, {len(differ)} tensors differ: begin a "
                "new run, or give the method and its options as they were"
            )
        with foreign_in_one_line(self.folder):
            run.load_state_dict(self._leave_out(state, run))
            self._find_place(run)
        weights, adapter = (x and Path(run.settings.proj_dir, x) for x in self.values["saved"])
        if weights or adapter:
            run.saved = Saved(weights, adapter)
        run.saved_loss = self.values["saved_loss"]
        if self.values.get("is_saving"):
            self.lines.append(
                f"resume: the files of epoch {run.settings.epoch_begin + run.epoch - 1} were being "
                "written when the run was ended, and are missing"
            )
        step, steps = run.progress.step, run.plan.steps
        self.lines.extend(self._compare_versions(run))
        self.lines.append(f"resume: goes on after step {step:,} of {steps:,}, from {self.folder}")

    def _find_place(self, run: Run) -> None:
        """Counts in the micro-batches and the steps of the run as it was allowed to change."""
        progress, plan = run.progress, run.plan
        then, now = self.values.get("micro_batches", len(plan.batches)), len(plan.batches)
        passes, taken = divmod(progress.position, then)
        # what is learned twice does less harm than what is left out
        progress.position = passes * now + taken * now // then
        left = plan.steps_from(progress.position)
        if not left and progress.step > plan.steps:
            raise CheckpointError(
                f"--resume {self.folder} is of more steps than the run has: give an earlier one, "
                "or a larger --epoch_count"
            )
        run.plan = plan._replace(steps=progress.step + left)
        if then != now:
            count = counted(now, "micro-batch", "micro-batches")
            self.lines.append(
                f"resume: a pass over the data has {count} and had {then:,}: it goes on where "
                f"{taken / then:.1%} of the pass are done"
            )

    def _leave_out(self, state: Mapping[str, Any], run: Run) -> Mapping[str, Any]:
        """The state without what has no meaning since settings were allowed to change."""
        then, now = self.values["settings"].get("optimizer"), run.settings.optimizer
        if then not in (None, now):
            state = {**state, "optimizer": {**state["optimizer"], "moments": {}}}
            self.lines.append(f"resume: {now} begins without the moments of {then}")
        evaluated = self.values.get("held_out")
        if run.validation and evaluated not in (None, hash_documents(run.validation.documents)):
            state = {**state, "validation": {}}
            self.lines.append("resume: evaluations begin anew, as their data is another")
        return state

    def _compare_versions(self, run: Run) -> Iterator[str]:
        now, then = find_versions(run.device), self.values["versions"]
        changed = {n: (now.get(n), then.get(n)) for n in {**then, **now}}
        changed = {n: pair for n, pair in changed.items() if pair[0] != pair[1]}
        if changed:
            yield (
                f"resume: {_name_changes(changed)}: the run goes on where it was, but not with the "
                "bits that it would have had there"
            )


def find_start(config: TrainConfig) -> Start | None:
    """Where a run goes on that is to be resumed; None: it begins.

    Raises:
        ConfigError: `--resume` names no checkpoint, or the settings are those of another run.
        CheckpointError: the checkpoint is damaged, or of a newer version of the program.
    """
    if not config.resume:
        return None
    folder, lines = _find_checkpoint(config)
    if folder is None:
        return _begin_again(config, lines)
    values = read_tree(folder)
    require_form(values, folder)
    config = _fill(config, values["settings"], folder)
    if "devices" in config.resume_changes or "num_nodes" in config.resume_changes:
        config = _keep_steps(config, values["settings"], lines)
    changes = _find_changes(config, values["settings"])
    wrong = {n: x for n, x in changes.items() if n not in config.resume_changes}
    if wrong:
        raise ConfigError(
            f"--resume {folder}: other settings than the run's: {_name_changes(wrong)}. Leave "
            f"them out, or allow them: --resume_changes {','.join(wrong)}"
        )
    if changes:
        lines.append(f"resume: changed by --resume_changes: {_name_changes(changes)}")
    return Start(config, folder, values, lines)


def find_settings(resume: str, proj_dir: str) -> dict[str, Any]:
    """The settings of the checkpoint that `--resume` means, {} if there is none yet.

    They are the defaults of a command line. Nothing is checked here.
    """
    folders = list_checkpoints(Path(proj_dir)) if resume == AUTO else [Path(resume)]
    for folder in folders:
        try:
            values = read_values(folder)
            require_form(values, folder)
        except (OSError, ValueError, RecursionError, CheckpointError):
            continue
        settings = values["settings"]
        return {**settings, "resume": resume, "proj_dir": proj_dir or _home(folder)}
    return {}


def describe_no_checkpoint(proj_dir: str) -> str:
    """What to do where `--resume auto` is all that a line says, and no checkpoint says the rest."""
    if holder := find_holder(Path(proj_dir)):
        return f"--proj_dir {proj_dir} is in use by {holder}: wait for its end"
    return (
        f"--resume auto: {proj_dir} has no checkpoint to go on from: give the whole line of the "
        "run again, with --resume auto"
    )


def _find_checkpoint(config: TrainConfig) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and a line for each that was passed over."""
    lines: list[str] = []
    if config.resume == AUTO:
        for folder in list_checkpoints(Path(config.proj_dir)):
            damage = find_damage(folder)
            if not damage:
                return folder, lines
            lines.append(f"resume: {folder} is passed over: {damage}")
        return None, lines
    folder = Path(config.resume)
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise ConfigError(
            f"--resume {folder} {what}: give the folder of a checkpoint, such as "
            f"out/{FOLDER}/step-000100, or auto with the run's --proj_dir"
        )
    if damage := find_damage(folder):
        whole = [x for x in list_checkpoints(folder) if not find_damage(x)]
        hint = f"give {whole[0]}" if whole else "give an earlier one, or --resume auto"
        raise CheckpointError(f"--resume {folder} is no whole checkpoint: {damage}: {hint}")
    return folder, lines


def _begin_again(config: TrainConfig, lines: list[str]) -> Start | None:
    """The beginning of a run that was stopped before its first checkpoint, if it is this one."""
    settings = read_settings(Path(config.proj_dir))
    makes_them = ("save_every_steps", "save_every_minutes")
    if settings is None or config.overwrite or not any(settings.get(n) for n in makes_them):
        return None
    again = _fill(config, settings, Path(config.proj_dir))
    if _find_changes(again, settings):
        return None
    # all else is chosen as it was, and said again
    again = replace(config, random_seed=again.random_seed)
    return Start(again, None, {"settings": settings}, lines)


def _fill(config: TrainConfig, settings: Mapping[str, Any], folder: Path) -> TrainConfig:
    """A config with what was left open taken from the settings of a run."""
    given = {f.name: getattr(config, f.name) for f in fields(config)}
    left_open = {n for n, x in given.items() if x in (None, "", AUTO)} - {"resume"}
    left_open |= {n for n in OPEN_AT_ZERO if not given[n]}
    if given["random_seed"] < 0:
        left_open.add("random_seed")
    if not given["peft_config"] and given["peft"] in (AUTO, settings.get("peft")):
        left_open.add("peft_config")
    filled = {n: settings[n] for n in left_open if n in settings}
    if "proj_dir" in left_open:
        filled["proj_dir"] = _home(folder)
    return replace(config, **filled)


def _keep_steps(config: TrainConfig, settings: Mapping[str, Any], lines: list[str]) -> TrainConfig:
    """The config of another number of devices with the same rows in each optimizer step."""
    name = "accumulate_grad_batches"
    then, now = settings["devices"] * settings["num_nodes"], config.devices * config.num_nodes
    if then == now or name in config.resume_changes:
        return config
    count, rest = divmod(settings[name] * then, now)
    if rest:
        raise ConfigError(
            f"--devices: a step of the run has {settings[name] * then} micro-batches, which {now} "
            f"devices cannot share evenly: give another number, or --{name} with "
            f"--resume_changes devices,{name}"
        )
    lines.append(
        f"resume: on {counted(now, 'device')} and not {then}, each with {name} {count}: a step has "
        "the same rows as before, and the run goes on equal but for rounding and dropout"
    )
    return replace(
        config, accumulate_grad_batches=count, resume_changes=[*config.resume_changes, name]
    )


def _home(folder: Path) -> str:
    """The run's folder that a checkpoint lies in."""
    if _spell_out(folder).parent.name != FOLDER:
        raise ConfigError(f"--resume {folder} lies in no run's folder: give --proj_dir")
    return str(_spell_out(folder).parent.parent)


def _spell_out(folder: Path) -> Path:
    """A checkpoint's folder by a path that names the run's, as . or ../step-2 does not."""
    return folder if folder.parent.name == FOLDER else folder.resolve()


def _find_changes(
    config: TrainConfig, settings: Mapping[str, Any]
) -> dict[str, tuple[object, object]]:
    """Settings that change a run, each now and then."""
    method = saved_method(config.load_adapter) if config.load_adapter else ""
    now = asdict(with_method(config, method))
    return {
        name: (now[name], value)
        for name, value in settings.items()
        if name in now and name not in HARMLESS and now[name] != value
    }


def _name_changes(changes: Mapping[str, tuple[object, object]]) -> str:
    return ", ".join(f"{name} is {now} and was {then}" for name, (now, then) in changes.items())
