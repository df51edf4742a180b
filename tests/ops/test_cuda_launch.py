"""The host code that plan the CUDA kernels: what it allocates, and what it does at every call."""

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rwkv_peft
from rwkv_peft.ops import OPERATORS
from rwkv_peft.ops.cuda import launch
from rwkv_peft.ops.cuda.launch import LaunchPlan, align, prepare_per_shape
from rwkv_peft.ops.wkv6 import cuda as wkv6_cuda
from rwkv_peft.ops.wkv7 import cuda as wkv7_cuda

MODULES = {"wkv6": wkv6_cuda, "wkv7": wkv7_cuda}
MIB = 2**20


class Prepared(NamedTuple):
    """Loads kernels that do nothing, and counts them and their launches."""

    kernels: Counter[str]
    launches: Counter[str]

    def load(
        self, name: str, dtype: torch.dtype, C: int, device: torch.device
    ) -> Callable[..., Any]:
        def kernel(grid: tuple[int, int, int], block: int, *numbers: int) -> Callable[..., None]:
            self.kernels[name] += 1
            return lambda *addresses: self.launches.update([name])

        return kernel


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on and that someone still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if any(made is x for x in args):  # written in place
            return made
        self._add(made.nbytes)
        weakref.finalize(made, self._add, -made.nbytes)
        return made

    def _add(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def length(dtype: torch.dtype, device: torch.device) -> int:
    return 64 if dtype == torch.bfloat16 else 32


def measured(op: str, forward_type: str, backward_type: str) -> tuple[float, float]:
    """MiB kept for backward and at the peak at (1, 4096, 32) in bf16; see benchmarks/ops.py."""
    num = {"wkv6": 4, "wkv7": 6}[op]
    *inputs, dy = torch.empty(num + 1, 1, 4096, 32, 64, dtype=torch.bfloat16, device="meta")
    if op == "wkv6":
        inputs.append(torch.empty(32, 64, device="meta"))
    module, load = MODULES[op], Prepared(Counter(), Counter()).load
    plan = LaunchPlan(load, length, inputs[0].shape, inputs[0].dtype, inputs[0].device)
    forward, backward = (getattr(module, x)(plan) for x in (forward_type, backward_type))
    with Allocated() as allocated:
        y, state, *kept = forward.run(*inputs, None, None, True)
        results = y.nbytes + state.nbytes
        kept_bytes = allocated.now - results
        saved = (state, *kept) if op == "wkv7" else kept
        grads = backward.run(*inputs, None, *saved, dy, None)
        results += sum(x.nbytes for x in grads[: num + 1 if op == "wkv6" else num])
    return kept_bytes / MIB, (allocated.peak - results) / MIB


def test_memory_beside_the_results_is_what_the_layout_says() -> None:
    # states and inverses of 64 chunks and 32 heads; at the peak also the states' gradients, and
    # a single gradient of a state
    assert measured("wkv7", "_ChunkParallelForward", "_ChunkParallelBackward") == (32, 48.5)
    # in one launch nothing lies between stages
    assert measured("wkv7", "_PersistentForward", "_PersistentBackward") == (32, 32.5)
    # u in float32 is kept too; the decays and the parts of du are not freed before the end
    kept = 16 + 32 * 64 * 4 / MIB
    assert measured("wkv6", "_Forward", "_Backward") == (
        kept,
        kept + 16 + 0.5 + 0.5 + 0.5,
    )


@pytest.mark.parametrize("op", MODULES)
def test_a_shape_seen_before_prepares_nothing(op: str) -> None:
    counts = Prepared(Counter(), Counter())
    function = MODULES[op].operator("prepared", counts.load, length)
    for T in (40, 70, 40, 70, 70):
        case = OPERATORS[op].make_case(B=1, T=T, H=1, has_state=False)
        inputs = [x.detach().requires_grad_() for x in case.inputs.values()]
        y, _ = function(*inputs, None, None)
        torch.autograd.grad(y, inputs, case.dy)
    # a stage serves both directions, or one
    assert sorted(set(counts.kernels.values())) == [2, 4]
    assert sum(counts.launches.values()) == 5 * 6


def test_one_launch_a_direction_where_a_block_goes_through_all_chunks() -> None:
    counts = Prepared(Counter(), Counter())
    function = wkv7_cuda.operator("persistent_alone", counts.load, length, lambda plan: True)
    case = OPERATORS["wkv7"].make_case(B=1, T=70, H=1, has_state=False, dtype=torch.bfloat16)
    inputs = [x.detach().requires_grad_() for x in case.inputs.values()]
    y, _ = function(*inputs, None, None)
    torch.autograd.grad(y, inputs, case.dy)
    assert counts.launches == {"wkv7_persistent_forward": 1, "wkv7_persistent_backward": 1}


class Chip(NamedTuple):
    """What the choice between the forms looks at."""

    multi_processor_count: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block_optin: int


H200, A100 = Chip(132, 233_472, 232_448), Chip(108, 167_936, 166_912)
RTX_4090 = Chip(128, 102_400, 101_376)


@pytest.mark.parametrize(
    ("chip", "persistent", "parallel"),
    [
        # where one was measured to be faster: (heads, rows times heads)
        (H200, (128, 192, 256, 384, 512, 2048), (1, 32, 64, 96, 160)),
        (A100, (104, 208, 640), (1, 32, 64, 128)),
        (RTX_4090, (), (1, 64, 128, 256, 2048)),
    ],
)
def test_blocks_go_through_all_chunks_where_heads_fill_the_gpu(
    chip: Chip,
    persistent: tuple[int, ...],
    parallel: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "_properties", lambda device: chip)
    cuda, load = torch.device("cuda"), Prepared(Counter(), Counter()).load

    def plan(heads: int, dtype: torch.dtype, device: torch.device = cuda) -> LaunchPlan:
        shape = torch.Size((1, 100, heads, 64))
        return LaunchPlan(load, wkv7_cuda.KERNELS.chunk_length, shape, dtype, device)

    found = {
        n: wkv7_cuda.uses_persistent(plan(n, torch.bfloat16)) for n in (*persistent, *parallel)
    }
    assert found == {**dict.fromkeys(persistent, True), **dict.fromkeys(parallel, False)}
    assert not wkv7_cuda.uses_persistent(plan(256, torch.float32))


def test_launches_are_made_ready_in_each_thread() -> None:
    prepared, launches = list[int](), list[int]()

    class Direction:
        def __init__(self, plan: LaunchPlan) -> None:
            self.thread = threading.get_ident()
            prepared.append(self.thread)

        def run(self, r: torch.Tensor) -> None:
            launches.append(self.thread)
            assert self.thread == threading.get_ident()

    function = prepare_per_shape(Direction, Prepared(Counter(), Counter()).load, length)

    def call_twice() -> None:
        for _ in range(2):
            function(torch.empty(1, 40, 1, 64))

    with ThreadPoolExecutor(1) as other:
        other.submit(call_twice).result()
    call_twice()
    assert len(prepared) == 2 and launches == [x for x in prepared for _ in range(2)]


@pytest.mark.parametrize("op", MODULES)
def test_a_call_runs_few_functions_of_ours(op: str) -> None:
    function = MODULES[op].operator("few", Prepared(Counter(), Counter()).load, length)
    case = OPERATORS[op].make_case(B=1, T=40, H=1, has_state=False)
    inputs = [x.detach().requires_grad_() for x in case.inputs.values()]
    ours, found = str(Path(rwkv_peft.__file__).parent), Counter[str]()

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ours):
            found[frame.f_code.co_name] += 1

    for _ in range(2):  # the first prepares
        found.clear()
        sys.setprofile(count)
        y, _ = OPERATORS[op].function(*inputs, kernel=function)
        torch.autograd.grad(y, inputs, case.dy)
        sys.setprofile(None)
    assert found.total() <= 40, found


def test_kernels_read_tensors_without_gaps_from_multiples_of_sixteen_bytes() -> None:
    whole = torch.arange(200.0)
    apart, shifted = whole.view(10, 20)[:, :4], whole[1:101]
    tensors, addresses = align(whole, apart, shifted)
    assert addresses == [x.data_ptr() for x in tensors]
    assert all(x.is_contiguous() and at % 16 == 0 for x, at in zip(tensors, addresses, strict=True))
    assert tensors[0] is whole
    for found, given in zip(tensors, (whole, apart, shifted), strict=True):
        assert torch.equal(found, given)
