"""A product that is added to what is there, in compiled code too."""

import torch
from torch import Tensor

_library = torch.library.Library("rwkv_peft", "FRAGMENT")
_library.define("add_product(Tensor(a!) y, Tensor x, Tensor w) -> ()")


def add_product(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Adds x w to y in place, for y (T, N), x (T, K), w (K, N), and gives y.

    A product reads what it adds to while it computes, which costs next to nothing. A compiler
    copies y first or adds in another pass, unless the whole is an operation of its own.
    """
    if not torch.compiler.is_compiling():
        return y.addmm_(x, w)
    torch.ops.rwkv_peft.add_product(y, x, w)
    return y


def _add_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    y.addmm_(x, w)


_library.impl("add_product", _add_product, "CompositeExplicitAutograd")
torch.library.register_fake("rwkv_peft::add_product", lambda y, x, w: None, lib=_library)
