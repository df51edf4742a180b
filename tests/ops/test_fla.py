"""The adapters of flash-linear-attention, with the recurrence in the place of its kernels.

The stand-ins take what fla's functions take: log decays, states (K, V), all documents in one row
with the places where they begin, and a state for each.
"""

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_peft.ops import OPERATORS
from rwkv_peft.ops.cases import run
from rwkv_peft.ops.wkv6.fla import MAX_LOGIT, wkv6_fla
from rwkv_peft.ops.wkv6.reference import wkv6_reference
from rwkv_peft.ops.wkv7.fla import wkv7_fla
from rwkv_peft.ops.wkv7.reference import DECAY_SCALE, wkv7_reference


def by_documents(
    form: Any, tensors: list[Tensor], u: list[Tensor], state: Tensor | None, begins: Tensor | None
) -> tuple[Tensor, Tensor]:
    if begins is None:
        y, last = form(*tensors, *u, None if state is None else state.mT, None)
        return y, last.mT
    assert all(len(x) == 1 for x in tensors)
    y, last = [], []
    for i, (begin, end) in enumerate(pairwise(begins)):
        rows = [x[:, begin:end] for x in tensors]
        results = form(*rows, *u, None if state is None else state[i : i + 1].mT, None)
        y.append(results[0])
        last.append(results[1].mT)
    return torch.cat(y, 1), torch.cat(last)


def chunk_rwkv7(  # type: ignore[no-untyped-def]
    r,
    w,
    k,
    v,
    a,
    b,
    scale=1.0,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    *,
    lower_bound,
):
    assert output_final_state and lower_bound == -DECAY_SCALE
    logits = torch.logit(w / lower_bound)
    return by_documents(wkv7_reference, [r, logits, k, v, a, b], [], initial_state, cu_seqlens)


def chunk_rwkv6(  # type: ignore[no-untyped-def]
    r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
):
    assert output_final_state and scale == 1.0
    return by_documents(wkv6_reference, [r, (-w).log(), k, v], [u], initial_state, cu_seqlens)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("op", OPERATORS)
def test_the_adapters_speak_the_language_of_fla(
    op: str, has_state: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, function in (("rwkv7", chunk_rwkv7), ("rwkv6", chunk_rwkv6)):
        module = SimpleNamespace(**{f"chunk_{name}": function})
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)
    case = OPERATORS[op].make_case(B=3, T=80, N=16, has_state=has_state, packed=packed)
    if op == "wkv6":  # of stronger decays fla is not told how strong
        case.inputs["w"].clamp_(max=MAX_LOGIT)
    expected = run(case, OPERATORS[op].reference)
    for name, x in run(case, {"wkv7": wkv7_fla, "wkv6": wkv6_fla}[op]).items():
        # decays go to logarithms and back
        assert (x - expected[name]).abs().max() < 1e-5 * expected[name].abs().max(), name
