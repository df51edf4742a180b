import copy
import gc
import math
import weakref
from contextlib import suppress
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rwkv_peft.training import flat, kinds
from rwkv_peft.training.kinds import Grouping
from rwkv_peft.training.optim import Optimizer


def make_optimizer(trained: dict[str, nn.Parameter], **changes: Any) -> Optimizer:
    """An optimizer with other values of its own arguments, or of its grouping's."""
    grouping = {"plain": trained, "raises_rates": True}
    own = {"betas": (0.9, 0.99), "eps": 1e-8, "grad_clip": 0.0}
    names = {x.name for x in fields(Grouping)}
    grouping |= {n: changes.pop(n) for n in list(changes) if n in names}
    return Optimizer(trained, Grouping(**grouping), **{**own, **changes})


def step(optimizer: Optimizer, lr: float, weight_decay: float = 0.0) -> float:
    """Takes one step as the training loop does, and gives the gradients' norm."""
    norm = math.hypot(*optimizer.clip().tolist())
    optimizer.step(lr, weight_decay, is_finite=math.isfinite(norm))
    return norm


def stepped_by_pytorch(
    start: list[torch.Tensor], gradients: list[list[torch.Tensor]]
) -> list[torch.Tensor]:
    """Float32 values after steps with the gradients of each step."""
    values = [nn.Parameter(x.float()) for x in start]
    adamw = torch.optim.AdamW(
        values, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, fused=True
    )
    for of_step in gradients:
        for value, gradient in zip(values, of_step, strict=True):
            value.grad = gradient.float()
        adamw.step()
    return [x.detach() for x in values]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("buffer_bytes", [0, 1500, 1 << 26])
def test_steps_of_buffers_are_bit_for_bit_those_of_adamw_on_float32_copies(
    buffer_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "MAX_BUFFER", buffer_bytes)
    generator = torch.Generator().manual_seed(0)
    # multiples of what a vector unit steps at once; the rest of a tensor may round otherwise
    shapes = [(16, 16), (32,), (48, 32), (2, 8, 16), (64,)]
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    drawn = [[torch.randn(x.shape, generator=generator).to(dtype) for x in start] for _ in range(5)]
    trained = {f"{i}.weight": nn.Parameter(x.clone()) for i, x in enumerate(start)}
    optimizer = make_optimizer(trained, plain=(), decays_adapter=True)
    for gradients in drawn:
        for parameter, gradient in zip(trained.values(), gradients, strict=True):
            optimizer.backward((parameter * gradient).float().sum())
        step(optimizer, lr=1e-3, weight_decay=0.1)
    matrices = [i for i, x in enumerate(start) if x.ndim == 2]
    expected = stepped_by_pytorch(
        [start[i] for i in matrices], [[of_step[i] for i in matrices] for of_step in drawn]
    )
    for i, value in zip(matrices, expected, strict=True):
        name = f"{i}.weight"
        assert torch.equal(optimizer.values[name], value)
        spacing = torch.finfo(dtype).eps * value.abs() + torch.finfo(dtype).smallest_normal
        assert ((trained[name] - value).abs() <= spacing / 2).all()


def test_tensors_are_aligned_views_of_few_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "MAX_BUFFER", 200)
    sizes = (3, 50, 7, 500, 1, 90, 11)
    start = [torch.randn(n).bfloat16() for n in sizes]
    trained = {f"{i}": nn.Parameter(x.clone()) for i, x in enumerate(start)}
    kept = dict(trained)
    make_optimizer(trained)
    assert all(torch.equal(trained[f"{i}"], x) for i, x in enumerate(start))
    assert all(kept[name] is parameter for name, parameter in trained.items())
    assert all(p.data_ptr() % 16 == 0 for p in trained.values())
    buffers = [p.untyped_storage().data_ptr() for p in trained.values()]
    # the one of 1000 bytes is alone
    assert [buffers.index(x) for x in buffers] == [0, 0, 0, 3, 4, 4, 6]


def all_memory() -> dict[int, torch.UntypedStorage]:
    """Of all tensors, by its place; what has it keeps it, so that no other comes to lie there."""
    gc.collect()
    found = {}
    for x in [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]:
        # what another test left may have no memory any more
        with suppress(RuntimeError):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage()
    return found


def bytes_beside(known: dict[int, torch.UntypedStorage]) -> int:
    """Of all memory of tensors but what is known."""
    return sum(x.nbytes() for place, x in all_memory().items() if place not in known)


def test_between_steps_a_bf16_number_takes_twelve_bytes() -> None:
    known = all_memory()
    num = 1 << 16
    trained = {f"{i}": nn.Parameter(torch.ones(n).bfloat16()) for i, n in enumerate((num - 16, 16))}
    optimizer = make_optimizer(trained)
    for _ in range(2):
        optimizer.backward(torch.stack([p.float().sum() for p in trained.values()]).sum())
        step(optimizer, lr=0.1)
        # and a few for what is single
        assert num * (2 + 2 + 8) <= bytes_beside(known) <= num * (2 + 2 + 8) + 100


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_one_backward_a_step_gives_the_same_bits_with_its_gradient_in_two_bytes(
    name: str, keeps: bool
) -> None:
    shapes = [(16, 16), (32,), (48, 32), (64,)]
    found = []
    for accumulates in (True, False):
        generator = torch.Generator().manual_seed(0)
        trained = {
            f"{i}": nn.Parameter(torch.randn(shape, generator=generator).bfloat16())
            for i, shape in enumerate(shapes)
        }
        # the second is clipped to a hundredth and less
        optimizer = make_optimizer(
            trained, grad_clip=0.5, optimizer=name, accumulates=accumulates, decays_adapter=True
        )
        if keeps:
            optimizer.keep_gradients()
        norms = []
        for scale in (1e-3, 1.0, 3.0):
            factors = [scale * torch.randn(shape, generator=generator) for shape in shapes]
            # the third tensor has a gradient in the first step alone
            reached = [i for i in range(4) if i != 2 or scale == 1e-3]
            terms = [(trained[f"{i}"] * factors[i].bfloat16()).sum() for i in reached]
            optimizer.backward(torch.stack(terms).sum())
            exact = [factors[i].bfloat16().double().square().sum() for i in reached]
            norms.append(step(optimizer, lr=0.01, weight_decay=0.1))
            assert norms[-1] == pytest.approx(math.sqrt(sum(exact)), rel=1e-5)
        found.append([*norms, *optimizer.values.values()])
    for wide, narrow in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(wide), torch.as_tensor(narrow))


@pytest.mark.parametrize(("accumulates", "each"), [(True, 16), (False, 14)])
def test_gradients_that_stay_take_two_bytes_where_a_step_has_one_backward(
    accumulates: bool, each: int
) -> None:
    known = all_memory()
    num = 1 << 16
    trained = {"x": nn.Parameter(torch.ones(num).bfloat16())}
    optimizer = make_optimizer(trained, accumulates=accumulates)
    optimizer.keep_gradients()
    for _ in range(2):
        optimizer.backward(trained["x"].float().sum())
        step(optimizer, lr=0.1)
        assert num * each <= bytes_beside(known) <= num * each + 100


def test_gradients_that_a_graph_writes_again_are_told() -> None:
    parameters = {"a": nn.Parameter(torch.ones(6).bfloat16())}
    optimizer = make_optimizer(parameters, accumulates=False)
    optimizer.keep_gradients()
    optimizer.backward(parameters["a"].sum())
    optimizer.clip()
    optimizer.step(0.1)
    # a replay writes where backward wrote, and nothing of backward runs
    optimizer.holders[0].grad.fill_(3)  # type: ignore[union-attr]
    found = optimizer.gradients["a"]
    assert found is not None
    assert found.tolist() == [3] * 6


def test_a_tensor_without_a_gradient_counts_as_zero_beside_one_that_has_it() -> None:
    found = []
    for factor in (None, 0.0):
        trained = {n: nn.Parameter(torch.ones(4).bfloat16()) for n in "ab"}
        optimizer = make_optimizer(trained)
        optimizer.backward(trained["a"].sum() + trained["b"].sum())
        step(optimizer, lr=0.1)
        objective = trained["a"].sum()
        optimizer.backward(objective if factor is None else objective + factor * trained["b"].sum())
        assert (optimizer.gradients["b"] is None) == (factor is None)
        step(optimizer, lr=0.1)
        found.append(optimizer.values["b"])
    assert torch.equal(*found)
    # what AdamW remembers of the first step goes on moving it
    assert (found[0] < 0.85).all()


def test_nothing_moves_where_no_gradient_is() -> None:
    trained = {n: nn.Parameter(torch.ones(4)) for n in "abc"}
    trained["c"] = nn.Parameter(torch.ones(4).bfloat16())
    optimizer = make_optimizer(trained)
    optimizer.backward(torch.stack(list(trained.values())).sum())
    step(optimizer, lr=0.1)
    before = {n: x.clone() for n, x in optimizer.values.items()}
    optimizer.backward(trained["a"].sum())
    step(optimizer, lr=0.1)
    moved = {n for n, x in optimizer.values.items() if not torch.equal(x, before[n])}
    assert moved == {"a"}


def test_tensors_are_clipped_by_group_whatever_their_type() -> None:
    types = {"a": torch.bfloat16, "b": torch.float32, "c": torch.bfloat16}
    trained = {n: nn.Parameter(torch.zeros(1, dtype=t)) for n, t in types.items()}
    optimizer = make_optimizer(
        trained, grad_clip=1.0, betas=(0.0, 0.0), eps=1.0, clip_groups={"a": "x", "b": "x"}
    )
    factors = {"a": 3, "b": 4, "c": 12}
    optimizer.backward(
        torch.stack([f * trained[n].float().sum() for n, f in factors.items()]).sum()
    )
    assert step(optimizer, lr=1.0) == pytest.approx(13.0)
    # with these settings Adam moves by g / (|g| + 1)
    for name, clipped in (("a", 0.6), ("b", 0.8), ("c", 1.0)):
        assert optimizer.values[name].item() == pytest.approx(-clipped / (1 + clipped)), name


def test_the_norm_of_millions_of_numbers_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(1 << 23, dtype=torch.bfloat16))
    gradient = torch.randn(parameter.shape, generator=generator).bfloat16()
    optimizer = make_optimizer({"x": parameter})
    optimizer.backward((parameter * gradient).sum())
    # every float32 addition is off by half an eps at most, and their errors do not add up
    assert step(optimizer, lr=0.0) == pytest.approx(gradient.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_values_go_on_where_they_were(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(2, 3).to(dtype))
    optimizer = make_optimizer({"x": parameter})
    value = torch.tensor([[1.0001, -1e-30, 0.0], [3e4, 1 / 3, -7.77]])
    optimizer.load({"x": value})
    assert torch.equal(optimizer.values["x"], value)
    assert torch.equal(parameter, value.to(dtype))
    assert list(optimizer.values) == ["x"] and len(optimizer.values) == 1


def test_a_parameter_with_two_names_is_stepped_once() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        shared = nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = make_optimizer({"a": shared, "b": shared})
        optimizer.backward(shared.sum())
        step(optimizer, lr=0.1)
        for value in optimizer.values.values():
            torch.testing.assert_close(value.detach(), torch.full((4,), 0.9))


def test_gradients_that_come_twice_in_one_backward_are_added() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda y: (y * parameter).sum(), x, use_reentrant=True) * 1.0

    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    x = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer = make_optimizer({"x": parameter})
    optimizer.backward(twice(x) + twice(x))
    gradient = optimizer.gradients["x"]
    assert gradient is not None and gradient.tolist() == [2.0] * 4


def test_steps_too_small_for_bf16_add_up() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = make_optimizer({"x": parameter})
    for _ in range(20):
        optimizer.backward(parameter.sum())
        assert parameter.grad is None
        step(optimizer, lr=1e-3)
    # one step of 0.001 is lost between 1 and the next smaller bf16, 0.99609375
    torch.testing.assert_close(optimizer.values["x"], torch.full((4,), 0.98), rtol=0, atol=1e-5)
    assert torch.equal(parameter, optimizer.values["x"].bfloat16())


def test_a_tensor_whose_data_a_method_replaces_is_stepped_all_the_same() -> None:
    trained = {n: nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for n in "ab"}
    optimizer = make_optimizer(trained)
    for _ in range(3):
        trained["b"].data = trained["b"].data.clone()
        optimizer.backward(sum(p.sum() for p in trained.values()))  # type: ignore[arg-type]
        step(optimizer, lr=1e-2)
        assert torch.equal(trained["a"], trained["b"])
        assert torch.equal(trained["b"], optimizer.values["b"].bfloat16())
    assert trained["b"].max() < 0.98


def test_an_optimizer_that_is_done_with_goes_at_once() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = make_optimizer({"x": parameter})
    optimizer.backward(parameter.sum())
    step(optimizer, lr=1e-3)
    assert dict(optimizer.values).keys() == {"x"}
    gone = weakref.ref(optimizer)
    # the memory of a device is no reason for Python to look for cycles
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_micro_batch_gradients_add_up_in_float32() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = make_optimizer({"x": parameter})
    for _ in range(512):
        optimizer.backward(parameter.sum())
    # a bf16 sum of ones stops at 256
    gradient = optimizer.gradients["x"]
    assert gradient is not None and gradient.item() == 512


def test_decay_touches_matrices_of_full_tuning_alone() -> None:
    names = ("blocks.0.att.key.weight", "blocks.0.att.w1", "blocks.0.ln1.weight")
    shapes = ((2, 2), (2, 2), (2,))
    for is_full in (True, False):
        trained = {n: nn.Parameter(torch.ones(s)) for n, s in zip(names, shapes, strict=True)}
        optimizer = make_optimizer(trained, plain=trained if is_full else ())
        optimizer.backward(sum((p * 0).sum() for p in trained.values()))  # type: ignore[arg-type]
        step(optimizer, lr=0.1, weight_decay=0.5)
        values = [p.flatten()[0].item() for p in trained.values()]
        assert values == pytest.approx([0.95, 1, 1] if is_full else [1, 1, 1])


def test_the_decay_bias_has_twice_the_rate_in_full_tuning_unless_switched_off() -> None:
    names = ("blocks.0.att.w0", "blocks.0.att.a0")
    for is_full, raises_rates, expected in ((True, True, 2), (True, False, 1), (False, True, 1)):
        trained = {n: nn.Parameter(torch.zeros(1)) for n in names}
        optimizer = make_optimizer(
            trained, plain=trained if is_full else (), raises_rates=raises_rates
        )
        optimizer.backward(trained[names[0]].sum() + trained[names[1]].sum())
        step(optimizer, lr=0.1)
        moved = [p.item() for p in trained.values()]
        assert moved[0] / moved[1] == pytest.approx(expected)


def test_gradients_are_clipped_together_and_the_norm_is_told() -> None:
    trained = {n: nn.Parameter(torch.zeros(1)) for n in "ab"}
    optimizer = make_optimizer(trained, grad_clip=1.0, betas=(0.0, 0.0), eps=1.0)
    optimizer.backward(3 * trained["a"].sum() + 4 * trained["b"].sum())
    assert step(optimizer, lr=1.0) == pytest.approx(5.0)
    # with these settings Adam moves by g / (|g| + 1)
    assert trained["a"].item() == pytest.approx(-0.6 / 1.6)
    assert trained["b"].item() == pytest.approx(-0.8 / 1.8)


def test_overflowing_half_precision_gradients_skip_the_step_and_lower_the_scale() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer = make_optimizer({"x": parameter}, uses_loss_scale=True)
    optimizer.backward(parameter.sum() * 60000)
    step(optimizer, lr=0.1)
    assert parameter.item() == 1
    for _ in range(30):
        optimizer.backward(parameter.sum())
        step(optimizer, lr=0.1)
    assert parameter.item() < 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [0, 100, 1 << 20])
def test_gradients_moved_together_are_bit_for_bit_those_moved_one_by_one(
    limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat, "MAX_WAITING", limit)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    trained = {f"{i}": nn.Parameter(draw(3, 1 + 7 * i)) for i in range(5)}
    trained["float32"] = nn.Parameter(draw(4).float())
    optimizer = make_optimizer(trained)
    expected: dict[str, torch.Tensor] = {}
    # of the first micro-batch the last two get no gradient
    for names in (list(trained)[:4], list(trained), list(trained)):
        gradients = {n: draw(*trained[n].shape) for n in names}
        optimizer.backward(
            torch.stack([(trained[n] * g).float().sum() for n, g in gradients.items()]).sum()
        )
        for name, drawn in gradients.items():
            expected[name] = drawn.float() + expected.get(name, 0)
        for name, gradient in optimizer.gradients.items():
            assert (gradient is None) == (name not in expected)
            assert gradient is None or torch.equal(gradient, expected[name])
            assert trained[name].grad is None or name == "float32"


class WithGradient(torch.autograd.Function):
    """Nothing of a parameter, whose gradient is noted when it is made."""

    @staticmethod
    def forward(ctx, parameter, made):  # type: ignore[no-untyped-def]
        ctx.parameter, ctx.made = parameter.detach(), made
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        gradient = torch.ones_like(ctx.parameter)
        ctx.made.append((StorageWeakRef(gradient.untyped_storage()), gradient.nbytes))
        return gradient, None


def test_gradients_that_wait_in_the_models_type_stay_within_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flat, "MAX_WAITING", 100)
    sizes = (10, 20, 30, 70, 10, 10, 30, 25)
    trained = {f"{i}": nn.Parameter(torch.ones(n).bfloat16()) for i, n in enumerate(sizes)}
    optimizer = make_optimizer(trained)
    made: list[tuple[StorageWeakRef, int]] = []
    waiting: list[int] = []

    def look(_: torch.Tensor) -> None:
        waiting.append(sum(size for storage, size in made if not storage.expired()))

    for parameter in trained.values():
        parameter.register_post_accumulate_grad_hook(look)
    for _ in range(2):
        optimizer.backward(
            torch.stack([WithGradient.apply(p, made) for p in trained.values()]).sum()
        )
    assert len(waiting) == 2 * len(sizes)
    assert max(waiting) == 100
    assert all(storage.expired() for storage, _ in made)


class Count(TorchDispatchMode):
    """Counts the operations that are called."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_a_step_launches_as_much_for_many_tensors_as_for_few() -> None:
    calls = []
    for num in (3, 40):
        trained = {f"{i}": nn.Parameter(torch.ones(2).bfloat16()) for i in range(num)}
        optimizer = make_optimizer(trained)
        for _ in range(2):  # the first step makes what AdamW remembers
            optimizer.backward(torch.cat(list(trained.values())).sum())
            with Count() as count:
                step(optimizer, lr=0.1)
        calls.append(count.calls)
    assert calls[0] == calls[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_optimizer_taken_up_from_its_state_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    shapes = ((3, 5), (7,), (40, 64))

    def draw(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    def make() -> tuple[dict[str, nn.Parameter], Optimizer]:
        trained = {f"blocks.{i}.weight": nn.Parameter(x) for i, x in enumerate(draw(0))}
        return trained, make_optimizer(trained, uses_loss_scale=dtype == torch.float16)

    def take(trained: dict[str, nn.Parameter], optimizer: Optimizer, seeds: range) -> None:
        for seed in seeds:
            # the second tensor has no gradient in the first step
            pairs = list(zip(trained.values(), draw(seed + 1), strict=True))
            used = pairs if seed else pairs[::2]
            optimizer.backward(sum((p.float() * g.float()).sum() for p, g in used))
            step(optimizer, lr=1e-3, weight_decay=0.1)

    trained, optimizer = make()
    take(trained, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    take(trained, optimizer, range(3, 6))
    others, taken_up = make()
    taken_up.load_state_dict(saved)
    take(others, taken_up, range(3, 6))
    for name, parameter in trained.items():
        assert torch.equal(parameter, others[name])
        assert torch.equal(optimizer.values[name], taken_up.values[name])


@pytest.mark.parametrize("name", ["adafactor", "adamw8bit"])
def test_tensors_stepped_by_themselves_are_float32_a_few_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    # some go together, one is larger than all that may
    shapes = [(16, 16), (30, 10), (48, 32), (64, 8), (5,), (2, 8, 16)]
    found = []
    # each begins at a multiple of eight
    whole = sum(-(-math.prod(shape) // 8) * 8 for shape in shapes)
    for most, expected in ((1 << 20, whole), (800, 48 * 32)):
        monkeypatch.setattr(flat, "MAX_STEPPED", most)
        generator = torch.Generator().manual_seed(0)
        start = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        trained = {f"{i}": nn.Parameter(x) for i, x in enumerate(start)}
        optimizer = make_optimizer(trained, optimizer=name)
        for _ in range(3):
            drawn = [torch.randn(shape, generator=generator) for shape in shapes]
            pairs = zip(trained.values(), drawn, strict=True)
            optimizer.backward(torch.stack([(p.float() * g).sum() for p, g in pairs]).sum())
            optimizer.clip()
            largest = Largest()
            with largest:
                optimizer.step(1e-2)
        assert largest.numbers == expected
        found.append({n: x.clone() for n, x in optimizer.values.items()})
    assert all(torch.equal(x, found[1][n]) for n, x in found[0].items())


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that is made float32."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.float32:
            self.numbers = max(self.numbers, result.numel())
        return result
