"""A few numbers of each adapted tensor as it was trained, to compare its merged form with.

Who merges an adapter attaches it again, and an error in attaching (another base, other factors)
would be in the adapter model and in the merged weights alike. So the run that has trained notes
what its own layers compute. The sketch of a matrix W (rows, columns) is u^T W x for a few pairs of
fixed random vectors of ones and minus ones. That of an error E is about as large as the Frobenius
norm of E, wherever E is. A layer gives that of its merged weight by its forward.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rwkv_peft.device import full_float32
from rwkv_peft.errors import CheckpointError
from rwkv_peft.methods.attach import Attachment
from rwkv_peft.methods.merge import find_owners, merge_by_peft, split_rows
from rwkv_peft.methods.options import one_line
from rwkv_peft.models.frozen import FrozenLinear

# pairs of random vectors, and rows of an embedding that are looked up at a time
PAIRS, ROWS = 4, 4096
# has the block of this path be whole; of an empty one there is none
Whole = Callable[[str], AbstractContextManager[Any]]
# how far two float32 sums may be apart, of the whole
FLOAT32 = 2e-5


class AsTrained:
    """What the layers of an adapter computed when it was saved.

    Attributes:
        worst: the largest error of what was compared, relative to the tensor.
        compared: names of the tensors that were.
    """

    def __init__(self, note: Mapping[str, Any]) -> None:
        """Takes what `sketch_layers` gave; an empty note compares nothing.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: it is something else.
        """
        self._noted = {
            name: torch.tensor([x, note["base"][name]], dtype=torch.float64).view(2, PAIRS)
            for name, x in note.get("outputs", {}).items()
        }
        self._rounding = torch.finfo(getattr(torch, note.get("dtype", "float32"))).eps
        self.worst, self.compared = 0.0, set[str]()

    def check(self, name: str, pieces: Iterable[Tensor], base: Tensor) -> Iterator[Tensor]:
        """Passes on the pieces of a merged float32 tensor, and compares them at the end.

        They may be apart by what training in a 16-bit type rounds: each change, and a base weight
        that is not the file's, because the method altered it or the file has another type.

        Args:
            base: the tensor in the base's file.
        Raises:
            CheckpointError: it is not what the layer computed as it was trained.
        """
        if name not in self._noted:
            yield from pieces
            return
        sketcher, norm = _Sketcher(base.shape, base.device), 0.0
        for piece in pieces:
            sketcher.add(piece)
            norm = math.hypot(norm, torch.linalg.vector_norm(piece).item())
            yield piece
        # as large as a sketch is on average; a single one may be much smaller than its matrix
        norm *= math.sqrt(PAIRS)
        wanted, own = self._noted[name]
        off = _distance(sketcher.total, wanted)
        allowed = FLOAT32 * norm + self._rounding * _distance(wanted, own)
        if off > allowed and _distance(sketch(base), own) > FLOAT32 * norm:
            allowed += self._rounding * norm
        error = off / norm if norm else off
        if not off <= allowed:
            raise CheckpointError(
                f"{name} would be off by {error:.1g} from what its layer computed when the adapter "
                "was saved: the adapter's files were changed since, or its method makes something "
                "else of the base here than in training. Give the files as they were saved, or let "
                "rwkv-peft merge insist by --force true"
            )
        self.worst = max(self.worst, error)
        self.compared.add(name)


@torch.no_grad()
def sketch_layers(
    attachment: Attachment, values: Mapping[str, Tensor], whole: Whole = nullcontext
) -> dict[str, Any]:
    """What the adapted layers of a model compute as they are, for `AsTrained`; fit for JSON.

    In float32, one layer at a time, and without a trace in the model or the random generators.

    Args:
        values: the trained tensors by name, which may be finer than those in the model.
        whole: has a block be whole while its layers are asked.
    """
    assert attachment.peft_model is not None
    model: Any = attachment.peft_model.base_model.model
    names = {id(parameter): name for name, parameter in attachment.items()}
    outputs, base = {}, {}
    device = next(iter(attachment.values())).device
    with (
        full_float32(),
        torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type),
    ):
        owners = find_owners(model, attachment).items()
        for path, together in groupby(owners, lambda pair: block_of(pair[0])):
            with whole(path):
                for name, owner in together:
                    if isinstance(owner, Tensor):
                        value = values[names[id(owner)]] if id(owner) in names else owner
                        outputs[name] = base[name] = sketch(value).tolist()
                        continue
                    leaf = name.rpartition(".")[2]
                    with _in_float32(owner, values, names), one_line(f"{name} cannot be merged"):
                        base[name] = sketch(_weight_of(owner.get_base_layer(), leaf)).tolist()
                        outputs[name] = _sketch_output(owner, leaf).tolist()
    dtype = str(next(x.dtype for x in model.parameters())).removeprefix("torch.")
    return {"dtype": dtype, "outputs": outputs, "base": base}


def block_of(name: str) -> str:
    """The path of the block that a tensor is in, by its official name; empty if it is in none."""
    return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""


def sketch(x: Tensor) -> Tensor:
    """The sketch (PAIRS,) of a tensor, float64 on the CPU."""
    sketcher = _Sketcher(x.shape, x.device)
    for rows in split_rows(x.detach()):
        sketcher.add(rows)
    return sketcher.total


def _weight_of(base: Any, leaf: str) -> Tensor:
    weight: Tensor = getattr(base, leaf)
    return base.dense(torch.float32) if isinstance(base, FrozenLinear) else weight


def _sketch_output(layer: Any, leaf: str) -> Tensor:
    """The sketch of the merged weight of a layer, by what the layer gives."""
    base = layer.get_base_layer()
    weight = getattr(base, leaf)
    is_linear = isinstance(base, FrozenLinear)
    shape = (base.out_features, base.in_features) if is_linear else weight.shape
    sketcher = _Sketcher(shape, weight.device)
    if is_linear:
        # only the last product is left to do
        sketcher.add_products(layer(sketcher.columns.T.contiguous()).T)
    elif isinstance(base, nn.Embedding):
        for start in range(0, shape[0], ROWS):
            end = min(start + ROWS, shape[0])
            sketcher.add(layer(torch.arange(start, end, device=sketcher.columns.device)))
    else:
        # vectors of norms, and parameters that are not of a layer that takes rows
        return sketch(merge_by_peft(layer, leaf))
    return sketcher.total


def _distance(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(one - other))


class _Sketcher:
    """The sum u^T W x over the rows of W, which come piece by piece."""

    def __init__(self, shape: Iterable[int], device: torch.device) -> None:
        rows, *rest = *shape, 1
        self.rows, self.columns = (
            _signs(count, seed).to(device) for seed, count in enumerate((rows, int(np.prod(rest))))
        )
        self._at, self._sum = 0, torch.zeros(PAIRS, dtype=torch.float64, device=device)

    def add(self, piece: Tensor) -> None:
        self.add_products(piece.float().reshape(-1, len(self.columns)) @ self.columns)

    def add_products(self, products: Tensor) -> None:
        """Takes the products W x (rows, PAIRS) of the next rows."""
        signs = self.rows[self._at : self._at + len(products)]
        self._sum += (products.double() * signs).sum(0)
        self._at += len(products)

    @property
    def total(self) -> Tensor:
        return self._sum.cpu()


@cache
def _signs(count: int, seed: int) -> Tensor:
    """Ones and minus ones (count, PAIRS), the same everywhere: NumPy keeps this stream for ever."""
    drawn = np.random.RandomState(seed).randint(0, 2, (count, PAIRS))
    return torch.from_numpy(drawn).float() * 2 - 1


@contextmanager
def _in_float32(
    layer: nn.Module, values: Mapping[str, Tensor], names: Mapping[int, str]
) -> Iterator[None]:
    """Has a layer compute in float32 and without dropout, with the finest values."""
    trained = [module for module in layer.modules() if module.training]
    stored = {x: x.data for x in (*layer.parameters(), *layer.buffers())}
    # of AdaMSS alone, which casts its input to it
    dtype = vars(layer).get("dtype")
    try:
        layer.eval()
        vars(layer).update({"dtype": torch.float32} if dtype else {})
        for x, data in stored.items():
            fine = values[names[id(x)]] if id(x) in names else data
            x.data = fine.detach().float() if fine.is_floating_point() else fine
        yield
    finally:
        for x, data in stored.items():
            x.data = data
        vars(layer).update({"dtype": dtype} if dtype else {})
        for module in trained:
            module.training = True
