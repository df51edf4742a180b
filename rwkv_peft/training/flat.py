"""Trained tensors of a 16-bit type in flat buffers, with float32 values and gradients."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.ops.adamw import step_in_place, steps_in_place
from rwkv_peft.training.halves import join, split

# bytes of gradients that may wait in the model's type to be moved together; larger ones never wait
MAX_WAITING = 16 * 2**20
# numbers that 16 bytes hold, at whose multiples kernels may load many at once
_ALIGNMENT = 8
# a CPU adds squares one after another, and a norm of millions loses its third digit
_ROW = 1024
# numbers of small tensors that are float32 at a time, where each is stepped by itself
MAX_STEPPED = 4 * 2**20


class Flat:
    """Trained tensors of one 16-bit dtype, made views of one buffer and numbered from 0.

    Master weights are float32. Of those beside a bf16 buffer only the lower 16 bits are kept, as
    the buffer has the others. float16 has another exponent, so whole float32 values lie beside it.

    Gradients are summed over backwards in float32. Where a step has one backward alone there is
    nothing to sum, and what that gives in bfloat16 is kept as it is.

    Attributes:
        master: what an optimizer steps, one dimension. Its values have memory within `step` alone,
            in float32; its gradient from the first backward until it is cleared.
        bits: the lower halves beside bf16 numbers, or whole values beside float16 ones.
        factor: what a gradient in bfloat16 is multiplied by within `step`, None for 1.
    """

    @torch.no_grad()
    def __init__(self, parameters: Sequence[Tensor], *, accumulates: bool = True) -> None:
        self._places: list[tuple[torch.Size, tuple[int, ...], int]] = []
        end = 0
        for parameter in parameters:
            strides = torch.empty(parameter.shape, device="meta").stride()
            self._places.append((parameter.shape, strides, end))
            end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        size = -(-end // _ROW) * _ROW
        self._param = parameters[0].new_zeros(size)
        self._addresses = [self.part(self._param, i).data_ptr() for i in range(len(parameters))]
        for i, parameter in enumerate(parameters):
            self.hold(i, parameter)
        self._is_bf16 = self._param.dtype == torch.bfloat16
        self.bits = torch.zeros_like(self._param, dtype=torch.int16)
        if not self._is_bf16:
            self.bits = self._param.float()
        # of the shape of the values, and without their memory
        dtype = torch.float32 if accumulates or not self._is_bf16 else torch.bfloat16
        self._no_memory = self._param.new_zeros(1, dtype=dtype).expand(size)
        self.master = nn.Parameter(self._no_memory)
        self.factor: Tensor | None = None
        # tensors of which there is a gradient, and those to which the next backward adds
        self._reached: set[int] = set()
        self._added: set[int] = set()

    @property
    def is_narrow(self) -> bool:
        """Whether gradients are kept in bfloat16."""
        return self.master.dtype == torch.bfloat16

    def hold(self, i: int, parameter: Tensor) -> None:
        """Makes tensor `i` a view of the buffer again: MiSS's mode 'bat' may have replaced it."""
        if parameter.data_ptr() != self._addresses[i]:
            view = self.part(self._param, i)
            view.copy_(parameter)
            parameter.data = view

    def value(self, i: int) -> Tensor:
        """The float32 value of tensor `i`, in its shape."""
        param, bits = self.part(self._param, i), self.part(self.bits, i)
        return join(param, bits) if self._is_bf16 else bits

    def set(self, i: int, value: Tensor) -> None:
        """Gives tensor `i` a value of any type, on any device."""
        param, bits = self.part(self._param, i), self.part(self.bits, i)
        self._write(torch.empty_like(param, dtype=torch.float32).copy_(value), param, bits)

    def gradient(self, i: int) -> Tensor | None:
        """The gradient of tensor `i` in float32, None if no backward reached it."""
        if self.master.grad is None or i not in self._reached:
            return None
        return self._widen(self.part(self.master.grad, i))

    def make_gradients(self) -> None:
        """Gives gradients memory, if they have none."""
        if self.master.grad is None:
            self._reached, self._added = set(), set()
            self.master.grad = torch.zeros_like(self.master, memory_format=torch.contiguous_format)

    def clear(self, *, keeps_memory: bool) -> None:
        """Ends a step: its gradients become zeros where they lie, or have no memory."""
        self.factor = None
        if not keeps_memory:
            self.master.grad = None
        elif self.master.grad is not None:
            self.master.grad.zero_()
            if self.is_narrow:
                # the one backward of a step writes; a graph of one among several must add
                self._added.clear()

    @torch.no_grad()
    def add_gradients(self, gradients: Mapping[int, Tensor]) -> None:
        """Adds gradients of tensors by their numbers to `master.grad`, in a few launches."""
        self.make_gradients()
        assert self.master.grad is not None
        sums = {i: self.part(self.master.grad, i) for i in gradients}
        first = gradients.keys() - self._added
        later = [i for i in gradients if i not in first]
        self._added |= first
        self._reached |= first
        if first:
            torch._foreach_copy_([sums[i] for i in first], [gradients[i] for i in first])
        if len(later) == 1 or self.is_narrow:
            # without a float32 copy, as it may be large
            for i in later:
                sums[i].add_(gradients[i])
        elif later:
            wide = [torch.empty_like(gradients[i], dtype=torch.float32) for i in later]
            torch._foreach_copy_(wide, [gradients[i] for i in later])
            torch._foreach_add_([sums[i] for i in later], wide)

    def row_norms(self) -> Tensor:
        """A few numbers whose norm is that of `master.grad`."""
        assert self.master.grad is not None
        rows = self.master.grad.view(-1, _ROW)
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        return norms

    def singles(self) -> list[nn.Parameter]:
        """A float32 parameter for each tensor, which has values and a gradient in `step` alone."""
        return [nn.Parameter(self._no_memory[:1].expand(shape)) for shape, _, _ in self._places]

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, singles: Sequence[nn.Parameter] = ()) -> None:
        """Has an optimizer step the values, which exist in float32 meanwhile.

        Args:
            singles: what it steps in place of `master`, as views of that, a few at a time.
        """
        kept = self.master.grad
        assert kept is not None
        if self._is_bf16 and steps_in_place(optimizer, kept.device):
            step_in_place(optimizer, self.master, self._param, self.bits, kept, self.factor)
            return
        for piece in self._pieces() if singles else ():
            self._step(optimizer, kept, [(singles[i], *self._places[i]) for i in piece])
        if not singles:
            self._step(optimizer, kept, [(self.master, kept.shape, (1,), 0)])
            self.master.grad = kept

    def _pieces(self) -> Iterator[range]:
        """Tensors one after the other, together of few numbers, or one alone."""
        first = 0
        for i, (shape, _, start) in enumerate(self._places):
            if i > first and start + shape.numel() - self._places[first][2] > MAX_STEPPED:
                yield range(first, i)
                first = i
        yield range(first, len(self._places))

    def _step(self, optimizer: torch.optim.Optimizer, gradients: Tensor, piece: list[Any]) -> None:
        first, last = piece[0][-1], piece[-1][-1] + piece[-1][0].numel()
        param, bits = self._param[first:last], self.bits[first:last]
        wide = join(param, bits) if self._is_bf16 else bits
        both = wide, self._widen(gradients[first:last])
        for x, shape, _, start in piece:
            at = slice(start - first, start - first + shape.numel())
            x.data, x.grad = (y[at].view(shape) for y in both)
        optimizer.step()
        self._write(wide, param, bits)
        for x, shape, *_ in piece:
            x.data, x.grad = self._no_memory[:1].expand(shape), None

    def _widen(self, gradient: Tensor) -> Tensor:
        """A gradient in float32, times `factor`."""
        wide = gradient.float()
        return wide if self.factor is None else wide.mul_(self.factor)

    def _write(self, master: Tensor, param: Tensor, bits: Tensor) -> None:
        if self._is_bf16:
            split(master, param, bits)
        else:
            bits.copy_(master)
            param.copy_(master)

    def part(self, flat: Tensor, i: int) -> Tensor:
        """The view of tensor `i` in a tensor that lies as the buffer does, such as a moment."""
        # one call, where a slice and a view of it would be two, for hundreds of tensors a step
        return flat.as_strided(*self._places[i])


class Gradients:
    """Gradients in the model's type on their way to flat buffers.

    Many go at once, as a launch costs more time than a small tensor does.
    """

    def __init__(self) -> None:
        self._waiting: dict[Flat, dict[int, Tensor]] = {}
        self._waiting_bytes = 0

    def send(self, parameter: Tensor, flat: Flat, i: int) -> None:
        """Takes the gradients of a parameter, which is tensor `i` of a buffer, from now on."""
        parameter.register_post_accumulate_grad_hook(partial(self._take, flat, i))

    def _take(self, flat: Flat, i: int, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        # one backward may give a tensor two gradients, as with checkpointing: they must be added
        is_here = i in self._waiting.get(flat, ())
        if is_here or self._waiting_bytes + gradient.nbytes > MAX_WAITING:
            self.move()
        if gradient.nbytes > MAX_WAITING:
            flat.add_gradients({i: gradient})
        else:
            self._waiting.setdefault(flat, {})[i] = gradient
            self._waiting_bytes += gradient.nbytes

    def drop(self) -> None:
        """Forgets the gradients that wait."""
        self._waiting, self._waiting_bytes = {}, 0

    def move(self) -> None:
        """Adds the gradients that wait to those of their buffers."""
        for flat, gradients in self._waiting.items():
            flat.add_gradients(gradients)
        self.drop()
