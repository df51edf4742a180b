"""Operators: the recurrences of RWKV over time, each a contract that several backends keep.

(`dequantise`, which makes stored weights dense, is chosen and built like them, and has no state.)

An operator is one function of tensors with one layout of its state, for any number of tokens. It
takes an optional initial state and the numbers of the documents packed into a row, and always gives
the last state. It is differentiable in every tensor, the initial state too. Backends adapt to this
contract, callers never adapt to a backend.

The package `ops.<operator>` has the contract, and in its `TABLE` the backends, the fastest first.
`dispatch` chooses one when a model is built. The `reference` backend computes token by token and is
the specification: all others are held against it within the error budget (`budget`), on the inputs
of `cases`, in the tests and on the user's device before a run (`selfcheck`).

State: (B, H, N, N) float32 (float64 beside float64 inputs), rows are values, columns are keys, as
in the `time_state` of official files. None in its place means zeros.

Segment ids: (B, T) int32 numbers of the documents packed into a row. They must not fall along it,
which is the caller's promise: to check it, the GPU would have to be waited for. The state restarts
where the number changes. An initial state belongs to the row's first document, the last state is
that of its last. Shapes stay the same whatever the documents are, so that packed rows can be
compiled and captured as graphs; a backend that needs `cu_seqlens` derives them (`segments`).
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from rwkv_peft.ops import wkv6, wkv7
from rwkv_peft.ops.cases import Case, make_wkv6_case, make_wkv7_case
from rwkv_peft.ops.dispatch import Backend
from rwkv_peft.ops.wkv6.chunked import wkv6_chunked
from rwkv_peft.ops.wkv6.reference import wkv6_baseline, wkv6_reference
from rwkv_peft.ops.wkv7.chunked import wkv7_chunked
from rwkv_peft.ops.wkv7.reference import wkv7_baseline, wkv7_reference

Function = Callable[..., tuple[Tensor, Tensor]]


class Operator(NamedTuple):
    """What there is of one recurrence.

    Attributes:
        function: checks its arguments and calls a backend.
        table: the backends, the fastest first.
        reference, chunked, baseline: forms in PyTorch, called as backends are.
        make_case: draws inputs for tests.
    """

    function: Function
    table: tuple[Backend, ...]
    reference: Function
    chunked: Function
    baseline: Function
    make_case: Callable[..., Case]


OPERATORS = {
    "wkv7": Operator(
        wkv7.wkv7, wkv7.TABLE, wkv7_reference, wkv7_chunked, wkv7_baseline, make_wkv7_case
    ),
    "wkv6": Operator(
        wkv6.wkv6, wkv6.TABLE, wkv6_reference, wkv6_chunked, wkv6_baseline, make_wkv6_case
    ),
}
