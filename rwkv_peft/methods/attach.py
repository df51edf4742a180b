"""Attaching a method to a model: the one place that decides what is trained."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rwkv_peft.errors import ConfigError
from rwkv_peft.methods import Method, factors, fast, residual
from rwkv_peft.methods.catalog import is_residual, method_config
from rwkv_peft.methods.limits import BoundedMemory, check_patterns
from rwkv_peft.methods.options import one_line
from rwkv_peft.methods.stored import let_read, readable, require_config
from rwkv_peft.models.awaited import AwaitedLinear
from rwkv_peft.models.base import RWKV

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# name of the adapter inside peft
ADAPTER = "default"


class Attachment(dict[str, nn.Parameter]):
    """The tensors to train, by their names in the model.

    Attributes:
        peft_model: peft's view of the adapted model, which knows what belongs into a file; None
            without an adapter.
        plain: names of the base's own tensors among them.
        start: the first values of an adapter (PiSSA, OLoRA) whose product was subtracted from the
            base weights, by name.
        init: peft's name of that initialisation.
        factors: names, in files, of what the method made of the base weights; see `factors.keep`.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        peft_model: "PeftModel | None" = None,
        plain: Sequence[str] = (),
        start: Mapping[str, Tensor] | None = None,
        init: str = "",
        factors: Sequence[str] = (),
    ) -> None:
        super().__init__(trained)
        self.peft_model, self.plain = peft_model, tuple(plain)
        self.start, self.init, self.factors = dict(start or {}), init, tuple(factors)


def attach(
    model: RWKV,
    method: Method,
    options: Mapping[str, Any],
    *,
    train_parts: Sequence[str] = (),
    is_fused: bool = True,
    weights: Mapping[str, Tensor] | None = None,
) -> Attachment:
    """Freezes the model, attaches the method and gives the tensors to train, by name.

    Args:
        method: 'none' trains every tensor that the forward reads, any other is one of peft's.
        options: the method's own peft config, without its defaults.
        train_parts: substrings of names; such tensors of the base are trained too (with 'none',
            they alone). `time` means the vectors and low-rank maps of time mixing.
        is_fused: replace the arithmetic of LoRA and MiSS by `methods.fast`.
        weights: of the base as in its file, for PiSSA and OLoRA where the model stores them.
    Raises:
        ConfigError: a name, an option or a part is unknown, or matches nothing in the model.
    """
    model.requires_grad_(False)
    parts = named_parts(model, train_parts)
    if method == "none":
        return with_parts(model, Attachment({}), parts or _used_parameters(model))
    config = method_config(method, options, model.model_config.version)
    attachment = attach_config(model, config, is_fused=is_fused, weights=weights)
    return with_parts(model, attachment, parts)


def attach_config(
    model: nn.Module,
    config: "PeftConfig",
    *,
    is_fused: bool = True,
    weights: Mapping[str, Tensor] | None = None,
) -> Attachment:
    """Like `attach`, with peft's own config, for example of a saved adapter."""
    model.requires_grad_(False)
    require_config(model, config)
    init = ""
    if is_residual(config):
        init = config.init_lora_weights
        config.init_lora_weights = True
    peft_model = inject(model, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(p.numel() for p in trained.values()):
        raise ConfigError("peft_config leaves nothing to train: name modules, or tokens, to adapt")
    with one_line("peft_config"):
        start = residual.begin(model, init, weights) if init else {}
        kept = factors.keep(peft_model, config)
    let_read(model)
    if is_fused:
        fast.fuse(model)
    return Attachment(trained, peft_model, start=start, init=init, factors=kept)


def _used_parameters(model: RWKV) -> dict[str, nn.Parameter]:
    """Those that its forward reads."""
    return {n: p for n, p in model.named_parameters() if n not in model.version.unread}


def named_parts(model: RWKV, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    """The tensors of a model that `--train_parts` means by these words.

    Raises:
        ConfigError: a word is in no name.
    """
    parameters = _used_parameters(model)
    found: dict[str, nn.Parameter] = {}
    for part in parts:
        pattern = re.compile(model.version.parts.get(part, re.escape(part)))
        names = [n for n in parameters if pattern.search(n)]
        if not names:
            leaves = sorted({n.removesuffix(".weight").rpartition(".")[2] for n in parameters})
            raise ConfigError(
                f"--train_parts: '{part}' is in the name of no tensor; use emb, head, ln or time, "
                f"or a part of a name such as {', '.join(leaves[:8])} …"
            )
        found |= {n: parameters[n] for n in names}
    return found


def with_parts(
    model: nn.Module, attachment: Attachment, parts: Mapping[str, nn.Parameter]
) -> Attachment:
    """Adds tensors of the base to those that are trained."""
    named = dict(model.named_parameters())
    for name, parameter in parts.items():
        if named.get(name) is not parameter:
            raise ConfigError(f"--train_parts names {name}, which the adapter changes already")
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, AwaitedLinear):
            owner.load()
        if not parameter.is_floating_point():
            raise ConfigError(
                f"--train_parts names {name}, which --quant stores rounded: name other parts, or "
                "use --quant none"
            )
        parameter.requires_grad_(True)
        attachment[name] = parameter
    attachment.plain = tuple(parts)
    return attachment


def inject(model: nn.Module, config: "PeftConfig") -> "PeftModel":
    """Puts the layers of a config into the model, in place, and gives peft's view of it.

    Raises:
        ConfigError: a target module matches nothing, or cannot be adapted; or the options ask for
            what no adapter of this model needs.
    """
    from peft import PeftModel

    check_patterns(model, config)
    _check_targets(model, config)
    with readable(model), one_line("peft_config"), BoundedMemory(model):
        # the adapter keeps the model's dtype: its float32 values are the optimizer's
        return PeftModel(model, config, ADAPTER, autocast_adapter_dtype=False)


def _check_targets(model: nn.Module, config: "PeftConfig") -> None:
    names = [name for name, _ in model.named_modules()]
    for field in ("target_modules", "modules_to_save", "feedforward_modules"):
        targets = getattr(config, field, None)
        if isinstance(targets, str) or not targets:
            continue
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                leaves = {n.rpartition(".")[2] for n, m in model.named_modules() if _is_leaf(m)}
                raise ConfigError(
                    f"{field}: '{target}' is not a module of this model; there are "
                    + ", ".join(sorted(leaves))
                )


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm))


def adapter_tensors(attachment: Attachment) -> dict[str, Tensor]:
    """What belongs into an adapter's file: the model's own tensors by their keys there."""
    from peft import get_peft_model_state_dict

    assert attachment.peft_model is not None
    # saving embeddings is off, since peft would look for a config of the base on a hub
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        attachment.peft_model,
        state_dict=attachment.peft_model.state_dict(keep_vars=True),
        save_embedding_layers=False,
    )
    return tensors | {PREFIX + name: attachment[name] for name in attachment.plain}


# of every key in peft's files
PREFIX = "base_model.model."


@torch.no_grad()
def load_values(attachment: Attachment, values: Mapping[str, Tensor]) -> None:
    """Puts the tensors of an adapter's file into an adapted model."""
    from peft import set_peft_model_state_dict

    assert attachment.peft_model is not None
    factors.follow(attachment.peft_model, values)
    set_peft_model_state_dict(attachment.peft_model, dict(values), ADAPTER)
