"""The projections of a model: linear layers whose weight may be stored in any form."""

import torch
from torch import Tensor, nn

from rwkv_peft.ops.products import add_product


class FrozenLinear(nn.Linear):
    """y = x W^T without a bias, for a weight that stays as it is while an adapter is trained.

    Layers fused with an adapter and merging ask for no more than what is defined here. This class
    stores W (out, in) dense, and full tuning trains it. A quantised form is a subclass that stores
    it otherwise, in `weight` and in buffers, and defines all this and `forward` anew, but for the
    sums of two products.

    The first three are called in every step of a short row, which is bound by the host: so they
    read the dictionary of the module, as `nn.Module.__getattr__` costs as much as a product.
    """

    # name of the quantised form, none if dense
    storage = ""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that inputs must have and outputs get."""
        dtype: torch.dtype = self._parameters["weight"].dtype  # type: ignore[union-attr]
        return dtype

    def add_product(self, y: Tensor, x: Tensor) -> Tensor:
        """Adds x W^T to y (T, out) in place, for x (T, in), and gives y. Autograd is not told."""
        return add_product(y, x, self._parameters["weight"].t())  # type: ignore[union-attr]

    def add_transposed(self, dx: Tensor, dy: Tensor) -> Tensor:
        """Adds dy W to dx (T, in) in place, for dy (T, out), and gives dx. Autograd is not told."""
        return add_product(dx, dy, self._parameters["weight"])  # type: ignore[arg-type]

    def product_plus(self, x: Tensor, u: Tensor, b: Tensor) -> Tensor:
        """x W^T + u b (T, out) for x (T, in) and narrow u (T, r). Autograd is not told."""
        return self.add_product(torch.mm(u, b), x)

    def transposed_plus(self, dy: Tensor, g: Tensor, a: Tensor) -> Tensor:
        """dy W + g a (T, in) for dy (T, out) and narrow g (T, r). Autograd is not told."""
        return self.add_transposed(torch.mm(g, a), dy)

    def dense(
        self, dtype: torch.dtype | None = None, rows: slice = slice(None), *, copy: bool = False
    ) -> Tensor:
        """These rows of W, (rows, in), detached.

        Args:
            dtype: of the result, `compute_dtype` if None.
            copy: the result has memory of its own, to be changed in place.
        """
        return self.weight.detach()[rows].to(dtype=dtype or self.compute_dtype, copy=copy)

    def store(self, weight: Tensor) -> None:
        """Stores a dense weight (out, in), rounded to the form that this layer keeps."""
        self.weight.data = weight.to(self.weight.dtype)

    @property
    def num_bytes(self) -> int:
        """The memory that the weight takes."""
        return sum(x.nbytes for x in (*self.parameters(False), *self.buffers(False)))
