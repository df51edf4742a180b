"""Methods on a base that is stored in 8 or 4 bits: which can serve, and how they read a weight.

LoRA and MiSS ask a frozen layer for its products alone (`methods.fast`). peft's own arithmetic may
also read the weight: when a method begins, and in every step. Then it is given dequantised, and is
dropped as soon as it was used. What a method needs must be as the base is: it cannot train the
weights, nor change them, but for PiSSA and OLoRA, whose residual is stored (`methods.residual`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import fields
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rwkv_peft.errors import ConfigError
from rwkv_peft.methods.fast import form_of
from rwkv_peft.models.awaited import AwaitedLinear, load_awaited
from rwkv_peft.models.frozen import FrozenLinear

if TYPE_CHECKING:
    from peft import PeftConfig

# method -> why it cannot serve
REFUSED = {
    "none": "trains the weights themselves",
    "frod": "keeps a dense matrix of the size of each weight",
    "osf": "computes with dense factors of each weight in its place",
}
# option -> why it cannot serve, whatever the method
_REFUSED_OPTIONS = {
    "kasa_config": "changes the weights when it begins",
    "modules_to_save": "trains the weights themselves",
    "target_parameters": "computes with changed weights",
}


def require_served(method: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError if a method, or an option, cannot work on stored weights.

    Args:
        options: those of the method's config in peft that are not empty.
    """
    if method in REFUSED:
        raise ConfigError(
            f"--quant cannot serve --peft {method}, which {REFUSED[method]}: use lora, pissa, "
            "miss, state or another method, or --quant none"
        )
    for name, reason in _REFUSED_OPTIONS.items():
        if options.get(name) is not None:
            raise ConfigError(
                f"--quant cannot serve {name}={options[name]!r} of {method}, which {reason}: "
                "leave the option out, or use --quant none"
            )


def require_config(model: nn.Module, config: "PeftConfig") -> None:
    """Raises ConfigError if a method cannot work on the layers that a model stores.

    What it cannot do on weights that it only reads it does on those that are loaded.
    """
    given = {f.name: getattr(config, f.name) for f in fields(config)}
    try:
        require_served(str(config.peft_type.value).lower(), given)
    except ConfigError:
        if any(map(is_stored, model.modules())):
            raise
        load_awaited(model)


def is_stored(layer: nn.Module) -> bool:
    """Whether a layer stores its weight otherwise than dense."""
    return isinstance(layer, FrozenLinear) and bool(layer.storage)


@contextmanager
def readable(model: nn.Module) -> Iterator[None]:
    """Within it the projections of a model are plain linear layers, whose weights can be read.

    That of a stored layer is dequantised when it is read, and that of one that is not loaded comes
    from its file; only the last one is kept.
    """
    # peft's GLoRA adapts this very class and no subclass of it
    layers = [(x, type(x), vars(x)["_parameters"]) for x in model.modules() if _is_frozen(x)]
    last: dict[nn.Module, nn.Parameter] = {}
    try:
        for layer, _, _ in layers:
            if is_stored(layer) or isinstance(layer, AwaitedLinear):
                vars(layer)["_parameters"] = _Dequantised(copy(layer), last)
            layer.__class__ = nn.Linear
        yield
    finally:
        for layer, own, parameters in layers:
            layer.__class__, vars(layer)["_parameters"] = own, parameters


def _is_frozen(layer: nn.Module) -> bool:
    return type(layer) in (FrozenLinear, AwaitedLinear) or is_stored(layer)


class _Dequantised(dict[str, Any]):
    """The parameters of a stored layer: a tensor without memory for the names, dense if read."""

    def __init__(self, layer: Any, last: dict[nn.Module, nn.Parameter]) -> None:
        one = torch.empty(1, dtype=layer.compute_dtype, device=layer.weight.device)
        shape = layer.out_features, layer.in_features
        super().__init__(weight=nn.Parameter(one.expand(shape), requires_grad=False), bias=None)
        self._layer, self._last = layer, last

    def __getitem__(self, name: str) -> Any:
        if name != "weight":
            return super().__getitem__(name)
        if self._layer not in self._last:
            self._last.clear()
            self._last[self._layer] = nn.Parameter(self._layer.dense(), requires_grad=False)
        return self._last[self._layer]


def let_read(model: nn.Module) -> None:
    """Lets the layers of peft's that `methods.fast` does not serve read a stored weight."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and form_of(module) is None:
            base = getattr(module, "base_layer", None)
            if isinstance(base, nn.Module) and is_stored(base):
                own: Any = type(module)
                module.__class__ = _reading_class(own)


class _Readable(FrozenLinear):
    """A stored layer for one call: its products, and its weight if it is read."""

    _base: FrozenLinear
    _dtype: torch.dtype

    def __init__(self, base: FrozenLinear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        # no module of this one
        vars(self).update(bias=None, _base=base, _dtype=dtype)

    @cached_property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W (out, in), dequantised."""
        return nn.Parameter(self._base.dense(self._dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T, of which backward keeps the stored weight."""
        y: Tensor = self._base(x)
        return y


@cache
def _reading_class(layer: Any) -> type[nn.Module]:
    """The subclass of a peft layer that has a readable layer within while it is called."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        base = self._modules["base_layer"]
        self._modules["base_layer"] = _Readable(base, x.dtype)
        try:
            return layer.forward(self, x, *args, **kwargs)
        finally:
            self._modules["base_layer"] = base

    return type(f"Reading{layer.__name__}", (layer,), {"forward": forward})
