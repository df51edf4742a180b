"""The CUDA kernels, and the host code that plan them, emulated on a CPU."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rwkv_peft.ops import OPERATORS
from rwkv_peft.ops.budget import assert_within_budget
from rwkv_peft.ops.cases import run
from rwkv_peft.ops.cuda import launch
from rwkv_peft.ops.cuda.launch import Launch
from rwkv_peft.ops.dispatch import Request
from rwkv_peft.ops.wkv6 import cuda as wkv6_cuda
from rwkv_peft.ops.wkv7 import cuda as wkv7_cuda
from tests.ops.emulation import emulator

pytestmark = [emulator.needs_compiler, pytest.mark.usefixtures("poisoned_memory")]


class Form(NamedTuple):
    """An operator's kernels for one type of inputs and one chunk length."""

    op: str
    dtype: torch.dtype
    C: int
    is_persistent: bool = False

    def __str__(self) -> str:
        name = f"{self.op}-{str(self.dtype).removeprefix('torch.')}-{self.C}"
        return f"{name}-persistent" if self.is_persistent else name


MODULES = {"wkv6": wkv6_cuda, "wkv7": wkv7_cuda}
STAGES = tuple(
    Form(op, dtype, C)
    for op in MODULES
    for dtype, C in (
        (torch.bfloat16, 64),
        (torch.bfloat16, 32),
        (torch.float16, 32),
        (torch.float32, 32),
    )
)
PERSISTENT = Form("wkv7", torch.bfloat16, 64, is_persistent=True)
FORMS = (*STAGES, PERSISTENT)


def _function(form: Form) -> Callable[..., tuple[Tensor, Tensor]]:
    module = MODULES[form.op]

    def load(name: str, dtype: torch.dtype, C: int, device: torch.device) -> Callable[..., Launch]:
        source, signature, shared_bytes, options = module.KERNELS.recipe(name, dtype, C)
        return emulator.load(source, name, signature, shared_bytes, options)

    if form.is_persistent:
        return wkv7_cuda.operator(
            "persistent", load, lambda dtype, device: form.C, lambda plan: True
        )
    name = f"emulated_{form.C}_{str(form.dtype)[6:]}"
    return module.operator(name, load, lambda dtype, device: form.C)


FUNCTIONS = {form: _function(form) for form in FORMS}


def check(form: Form, T: int, decay: str = "trained", **shape: int | bool) -> None:
    op = OPERATORS[form.op]
    shape = {"B": 1, "H": 1, **shape}
    case = op.make_case(T=T, decay=decay, dtype=form.dtype, **shape)
    exact, baseline = run(case.to(torch.float64), op.reference), run(case, op.baseline)
    found = run(case, FUNCTIONS[form])
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert_within_budget(value, exact[name], baseline[name], f"{form} {name}")


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("T", [1, 17, 64, 100])
def test_the_kernels_stay_within_the_error_budget(form: Form, T: int) -> None:
    check(form, T)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("decay", ["none", "fastest", "mixed", "extreme"])
def test_they_do_with_every_decay(form: Form, decay: str) -> None:
    check(form, 70, decay)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_they_do_with_packed_documents_rows_and_heads(form: Form) -> None:
    check(form, 150, packed=True, B=2, H=2)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_they_do_without_an_initial_state(form: Form) -> None:
    check(form, 40, has_state=False)


MEMORY = {
    "wkv6_chunk": "ChunkMemory",
    "wkv6_output": "OutputMemory",
    "wkv6_gradients": "GradientMemory",
    "wkv7_chunk_forward": "ForwardMemory",
    "wkv7_persistent_forward": "PersistentMemory",
    "wkv7_chunk_backward": "BackwardMemory",
    "wkv7_gradients": "GradientMemory",
    "wkv7_persistent_backward": "PersistentMemory",
}


@pytest.mark.parametrize("form", STAGES, ids=str)
def test_the_host_gives_a_block_the_shared_memory_that_the_source_lays_out(form: Form) -> None:
    kernels = MODULES[form.op].KERNELS
    for name, (source, _) in kernels.sources.items():
        if name in MEMORY and (form.C == 64 or source not in kernels.bf16_only):
            _, _, size, options = kernels.recipe(name, form.dtype, form.C)
            emulator.require(f"{MEMORY[name]}::BYTES == {size}", source, options)
    matrices = torch.bfloat16 if form.dtype == torch.bfloat16 else torch.float32
    source, _, size, options = kernels.recipe("scan", matrices, 3)
    emulator.require(f"2 * sizeof(Exchange) + 3 * sizeof(Stage) == {size}", source, options)


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_in_one_launch_are_those_of_the_stages(packed: bool) -> None:
    case = OPERATORS["wkv7"].make_case(B=2, T=200, H=2, packed=packed, dtype=PERSISTENT.dtype)
    exact = run(case.to(torch.float64), OPERATORS["wkv7"].reference)
    staged = run(case, FUNCTIONS[PERSISTENT._replace(is_persistent=False)])
    for name, value in run(case, FUNCTIONS[PERSISTENT]).items():
        # what is not rounded between stages is not worse
        errors = [(x.double() - exact[name]).norm() for x in (value, staged[name])]
        assert errors[0] <= 1.05 * errors[1], name


def test_pytorch_finds_nothing_wrong_with_the_operators_of_wkv6() -> None:
    case = OPERATORS["wkv6"].make_case(B=1, T=20, H=2, packed=True)
    inputs = [x.detach().requires_grad_() for x in case.inputs.values()]
    operators = torch.ops.rwkv_peft
    state = case.initial_state
    # its gradients are held against float64 above
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    forward = operators.wkv6_emulated_32_float32.default
    torch.library.opcheck(forward, (*inputs, state, case.segment_ids, True), test_utils=checks)
    _, _, *kept = forward(*inputs, state, case.segment_ids, True)
    given = (*case.inputs.values(), case.segment_ids, *kept, case.dy, case.dstate)
    backward = operators.wkv6_emulated_32_float32_backward.default
    torch.library.opcheck(backward, given, test_utils=checks)


def test_wkv6_without_gradients_keeps_nothing() -> None:
    case = OPERATORS["wkv6"].make_case(B=1, T=40, H=1)
    forward = torch.ops.rwkv_peft.wkv6_emulated_32_float32.default
    arguments = (*case.inputs.values(), case.initial_state, None)
    y, state, states, _ = forward(*arguments, True)
    assert states.shape == (1, 1, 2, 64, 64)
    y_alone, state_alone, nothing, _ = forward(*arguments, False)
    assert torch.equal(y_alone, y) and torch.equal(state_alone, state) and nothing.numel() == 0


@pytest.mark.parametrize("op", MODULES)
def test_chunks_are_taken_that_fit_the_gpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, kernels = torch.device("cuda"), MODULES[op].KERNELS
    monkeypatch.setattr(launch.availability, "objection", lambda request: None)
    for found, bf16_chunk, fp32 in ((232_448, 64, None), (101_376, 32, "bytes of shared memory")):
        monkeypatch.setattr(launch, "max_shared_bytes", lambda device, found=found: found)
        assert kernels.chunk_length(torch.bfloat16, device) == bf16_chunk
        assert kernels.objection(Request(device, torch.bfloat16, 64)) is None
        said = kernels.objection(Request(device, torch.float32, 64))
        assert said is None if fp32 is None else said is not None and fp32 in said
