"""Steps of an optimizer over float32 values, with clipping and loss scaling."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rwkv_peft.device import PLUGINS, free_cache
from rwkv_peft.parallel.strategy import Strategy
from rwkv_peft.training.by_name import ByName, Memory
from rwkv_peft.training.flat import Flat, Gradients
from rwkv_peft.training.kinds import Grouping, Kind, pack
from rwkv_peft.training.optimizers import OPTIMIZERS


class Optimizer(ByName):
    """Steps trained tensors in float32, whatever their type in the model is.

    Float32 parameters are stepped as they are, one without a gradient not at all. Those of a
    16-bit type become views of flat buffers (see `Flat`), each stepped as one tensor: what it holds
    beside the model's weights is 2 bytes a bf16 number for the lower half of its float32 value, 8
    for AdamW's moments, and 4 for its gradient from the first backward to the step. Gradients of
    micro-batches are added in float32 during backward, so that accumulation does not round, and a
    small step is not lost in a bf16 weight; where a step has one backward alone, a gradient has the
    2 bytes a number that backward gives. Where a buffer has a gradient, zeros are that of a tensor
    in it that has none. An optimizer that looks at a tensor as a whole steps views of a buffer, one
    for each tensor.

    Attributes:
        uses_loss_scale: gradients are scaled against underflow, for fp16.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        grouping: Grouping,
        *,
        betas: tuple[float, float],
        eps: float,
        grad_clip: float,
        uses_loss_scale: bool = False,
        accumulates: bool = True,
        strategy: Strategy | None = None,
    ) -> None:
        """Lays out the tensors by their kinds.

        Args:
            accumulates: a step may have more than one backward, or add other ranks' gradients.
            strategy: by which ranks may each have parts of the tensors alone; they are stepped in
                float32, and what is asked of them by name is whole, and asked by all ranks.
        """
        self._strategy = strategy or Strategy()
        self._shards = {name: x for name, x in self._strategy.shards.items() if name in trained}
        trained = {n: self._shards[n].own if n in self._shards else x for n, x in trained.items()}
        self._parameters = dict(trained)
        self._grad_clip, self.uses_loss_scale = grad_clip, uses_loss_scale
        self._keeps_gradients, self._has_stepped = False, False
        self._device = next(iter(trained.values())).device
        self._places: dict[Tensor, tuple[Flat, int]] = {}
        self._waiting = Gradients()
        self._states: dict[Tensor, Memory] = {}
        self._parts: list[Part] = []
        self._clip_groups: dict[str, list[Part]] = {}
        self._is_fused = grouping.optimizer == "adamw" and self._device.type not in (
            "cpu",
            *PLUGINS,
        )
        for kind, names in grouping.group(trained, self._shards).items():
            parameters: list[Tensor] = list({trained[name]: None for name in names})
            is_flat = kind.dtype.itemsize == 2
            for together in pack(parameters) if is_flat else [parameters]:
                flat = self._flatten(together, accumulates) if is_flat else None
                part = _make_part(kind, together, flat, betas, eps)
                self._states |= part.states(together)
                self._parts.append(part)
                self._clip_groups.setdefault(kind.clip_group, []).append(part)
        self._scaler = self._strategy.make_scaler(self._device.type, uses_loss_scale)

    def _flatten(self, parameters: list[Tensor], accumulates: bool) -> Flat:
        flat = Flat(parameters, accumulates=accumulates)
        for i, parameter in enumerate(parameters):
            self._places[parameter] = flat, i
            self._waiting.send(parameter, flat, i)
        return flat

    def keep_gradients(self) -> None:
        """Has gradients lie where they are from now on, as a CUDA graph needs it."""
        self._keeps_gradients = True
        for part in self._parts:
            if part.flat:
                part.flat.make_gradients()

    @property
    def can_skip(self) -> bool:
        """Whether `step` may be told by a tensor that it is to change nothing."""
        return self._is_fused and not self.uses_loss_scale

    @property
    def holders(self) -> list[Tensor]:
        """What has the gradients of a step: flat buffers, and float32 parameters."""
        return [x for part in self._parts for x in part.tensors]

    def backward(self, objective: Tensor) -> None:
        """Adds the gradient of an objective (), such as that of one micro-batch."""
        self._scaler.scale(objective).backward()
        self._waiting.move()

    def forget(self) -> None:
        """Drops what a backward that failed has left half done."""
        self._waiting.drop()

    @torch.no_grad()
    def clip(
        self,
        before: Callable[[], None] | None = None,
        rates: tuple[float, float] = (0.0, 0.0),
    ) -> Tensor:
        """Clips the gradients and gives their norms before that, one of each clip group.

        The norms (groups,) are on the device, and nobody has waited for them.

        Args:
            before: may change the gradients first.
            rates: of learning and decay, for an optimizer that clips and steps at once.
        """
        for part in self._parts:
            self._scaler.unscale_(part.holder)
        if before:
            before()
        return torch.stack([self._clip(parts) for parts in self._clip_groups.values()])

    @torch.no_grad()
    def step(
        self,
        lr: float,
        weight_decay: float = 0.0,
        *,
        is_finite: bool | Tensor = True,
        after: Callable[["Optimizer"], None] | None = None,
    ) -> None:
        """Takes one step by the gradients that `clip` left, and clears them.

        The decay acts on weight matrices of the model, and on nothing else unless asked to.

        Args:
            is_finite: whether the norms are; if not, no step is taken. With loss scaling that
                happens now and then, and lowers the scale. A tensor () bool is not waited for,
                where `can_skip`.
            after: is called with the new values while the gradients are still there.
        """
        skips = ~is_finite if isinstance(is_finite, Tensor) else None
        for part in self._parts:
            # what PyTorch's fused kernels read as the sign to leave all as it is
            part.optimizer.found_inf = None if skips is None else skips.float()  # type: ignore[attr-defined]
        if skips is not None or is_finite:
            if not self._has_stepped:
                # or moments, which stay, would lie about in what backward has left
                free_cache(self._device)
            self._has_stepped = True
            for parameter, (flat, i) in self._places.items():
                flat.hold(i, parameter)
            for part in self._parts:
                part.step(lr, weight_decay)
            if after:
                after(self)
        self._scaler.update()
        for part in self._parts:
            if part.flat:
                part.flat.clear(keeps_memory=self._keeps_gradients)
            else:
                part.holder.zero_grad(set_to_none=not self._keeps_gradients)

    def _clip(self, parts: list["Part"]) -> Tensor:
        """Clips gradients together and gives their norm before that."""
        norm = self._norm(part for part in parts if not part.kind.is_shared)
        if self._shards:
            of_shards = self._norm(part for part in parts if part.kind.is_shared)
            norm = torch.hypot(norm, self._strategy.total_norm(of_shards))
        if self._grad_clip:
            narrow = [part.flat for part in parts if part.flat and part.flat.is_narrow]
            wide = [x for part in parts if part.flat not in narrow for x in part.tensors]
            nn.utils.clip_grads_with_norm_(wide, self._grad_clip, norm, foreach=True)
            factor = (self._grad_clip / (norm + 1e-6)).clamp(max=1)
            for flat in narrow:
                flat.factor = factor
        return norm

    def _norm(self, parts: Iterable["Part"]) -> Tensor:
        measured = [x for part in parts for x in part.measured()]
        norm: Tensor = nn.utils.get_total_norm(measured, foreach=True).to(self._device)
        return norm


@dataclass(frozen=True, slots=True)
class Part:
    """What is stepped at once: the tensor of a flat buffer, its views, or float32 parameters.

    Attributes:
        holder: an optimizer that has the gradients; another than the one that steps for views.
        singles: views of a buffer that are stepped; () if it is stepped as a whole.
    """

    kind: Kind
    optimizer: torch.optim.Optimizer
    holder: torch.optim.Optimizer
    flat: Flat | None
    singles: list[nn.Parameter]

    @property
    def tensors(self) -> list[Tensor]:
        """What has the gradients."""
        found: list[Tensor] = self.holder.param_groups[0]["params"]
        return found

    def states(self, parameters: list[Tensor]) -> dict[Tensor, Memory]:
        """What is remembered of each tensor of the model."""
        if self.flat is None:
            return {x: Memory(self.optimizer, x, None, 0) for x in parameters}
        if self.singles:
            pairs = zip(parameters, self.singles, strict=True)
            return {x: Memory(self.optimizer, single, None, 0) for x, single in pairs}
        master = self.flat.master
        return {x: Memory(self.optimizer, master, self.flat, i) for i, x in enumerate(parameters)}

    def measured(self) -> list[Tensor]:
        """Tensors whose norm is that of the gradients."""
        if self.flat:
            return [] if self.flat.master.grad is None else [self.flat.row_norms()]
        return [x.grad for x in self.tensors if x.grad is not None]

    def step(self, lr: float, weight_decay: float) -> None:
        """Takes one step, where there are gradients."""
        group = self.optimizer.param_groups[0]
        group["lr"] = lr * self.kind.lr_scale
        group["weight_decay"] = weight_decay if self.kind.decays else 0.0
        if not self.flat:
            self.optimizer.step()
        elif self.flat.master.grad is not None:
            self.flat.step(self.optimizer, self.singles)


def _make_part(
    kind: Kind,
    parameters: list[Tensor],
    flat: Flat | None,
    betas: tuple[float, float],
    eps: float,
) -> Part:
    maker = OPTIMIZERS[kind.optimizer]
    singles = flat.singles() if flat and not maker.is_elementwise else []
    whole = [flat.master] if flat else parameters
    optimizer = maker.make(singles or whole, betas, eps)
    holder = torch.optim.SGD(whole, lr=0.0) if singles else optimizer
    return Part(kind, optimizer, holder, flat, singles)
