"""The shape of a model, as read from the names and shapes of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rwkv_peft.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that fixes the tensors of a model.

    Attributes:
        version: the name of a version of `models.VERSIONS`, such as 'x070'.
        n_layer, n_embd, dim_att, dim_ffn, head_size, vocab_size: L, D, D, F, N, V.
        ranks: widths of the low-rank maps; of w, a, v and g in RWKV-7, of maa and decay in RWKV-6.
            The widths of released files follow no single formula, so they are only ever read or
            asked for.
        has_first_value_mix: RWKV-7 files may hold blocks.0.att.v0, v1 and v2, which nothing reads.
        has_time_first: RWKV-5 files may hold the logarithm time_first in place of time_faaaa.
    """

    version: str
    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    head_size: int
    vocab_size: int
    ranks: dict[str, int] = field(default_factory=dict)
    has_first_value_mix: bool = True
    has_time_first: bool = False

    @property
    def n_head(self) -> int:
        """H, the number of heads."""
        return self.dim_att // self.head_size

    def describe(self) -> str:
        """One line for a person, such as 'x070, 12 layers of 768, vocabulary 65536'."""
        return (
            f"{self.version}, {self.n_layer} layers of {self.n_embd}, vocabulary {self.vocab_size}"
        )


def shape_of(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    """The shape of the tensor of that name.

    Raises:
        CheckpointError: it is missing, or has another number of dimensions.
    """
    found = shapes.get(name)
    if found is None or len(found) != ndim:
        what = "is missing" if found is None else f"has shape {found}"
        raise CheckpointError(f"damaged RWKV file: {name} {what}, {ndim} dimensions needed")
    return found
