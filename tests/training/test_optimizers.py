"""Each optimizer by its name: buffers of 16-bit tensors step as float32 tensors of their own do."""

import copy
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.training import hosted
from rwkv_peft.training.checkpoints import copy_to_host
from rwkv_peft.training.hosted import HostOptimizer
from rwkv_peft.training.kinds import Grouping
from rwkv_peft.training.optim import Optimizer
from rwkv_peft.training.optimizers import OPTIMIZERS
from rwkv_peft.training.run import train
from tests.training.test_resume import assert_same, run_in_parts

# the last is large enough for moments of 8 bits
SHAPES = [(16, 16), (32,), (48, 32), (2, 8, 16), (64,), (80, 64)]
RATE, DECAY, STEPS = 1e-2, 0.1, 4


def make_optimizer(
    trained: dict[str, nn.Parameter],
    name: str,
    plain: Collection[str] = (),
    make: type[Optimizer] = Optimizer,
    **changes: Any,
) -> Optimizer:
    grouping = Grouping(optimizer=name, decays_adapter=True, plain=plain)
    return make(
        trained, grouping, **{"betas": (0.9, 0.99), "eps": 1e-8, "grad_clip": 0.0, **changes}
    )


class Left:
    """Stands for the host: what was left there, as copies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: list[torch.Tensor] = []
        monkeypatch.setattr(hosted, "leave_on_host", self._leave)

    def _leave(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.tensors.append(x.clone())
        return self.tensors[-1]

    def has(self, x: torch.Tensor) -> bool:
        return any(x is y for y in self.tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_left_on_the_host_is_stepped_and_saved_as_what_stays(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    left = Left(monkeypatch)
    found = []
    for make in (Optimizer, HostOptimizer):
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator) for shape in SHAPES]
        trained = {f"{i}.weight": nn.Parameter(x.to(dtype)) for i, x in enumerate(drawn)}
        optimizer = make_optimizer(trained, name, make=make, grad_clip=1.0)
        for step in range(2 * STEPS):
            if step == STEPS:
                state = copy.deepcopy(optimizer.state_dict())
                trained = {n: nn.Parameter(x.detach().clone()) for n, x in trained.items()}
                optimizer = make_optimizer(trained, name, make=make, grad_clip=1.0)
                optimizer.load_state_dict(state)
            drawn = [torch.randn(shape, generator=generator) for shape in SHAPES]
            pairs = zip(trained.values(), drawn, strict=True)
            optimizer.backward(torch.stack([(x.float() * y).sum() for x, y in pairs]).sum())
            optimizer.clip()
            optimizer.step(RATE)
        found.append(optimizer.state_dict())
        states = [x for part in optimizer._parts for x in part.optimizer.state.values()]
        large = [x for held in states for x in held.values() if torch.is_tensor(x)]
        large = [x for x in large if x.numel() >= hosted.LEAST]
        assert all(left.has(x) == (make is HostOptimizer) for x in large)
        assert large or name == "adafactor"
        flats = [part.flat for part in optimizer._parts if part.flat]
        assert all(left.has(flat.bits) == (make is HostOptimizer) for flat in flats)
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion"])
def test_a_gpu_steps_what_is_left_on_the_host_with_the_same_bits(name: str) -> None:
    device, found = torch.device("cuda"), []
    for make in (Optimizer, HostOptimizer):
        generator = torch.Generator(device).manual_seed(0)
        x = nn.Parameter(torch.randn(2048, 2048, device=device, generator=generator).bfloat16())
        optimizer = make_optimizer({"x.weight": x}, name, make=make, grad_clip=1.0)
        for _ in range(STEPS):
            drawn = torch.randn(x.shape, device=device, generator=generator)
            optimizer.backward((x.float() * drawn).sum())
            optimizer.clip()
            optimizer.step(RATE)
        found.append(copy_to_host(optimizer.state_dict(), device))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def lion(values: list[torch.Tensor], gradients: list[list[torch.Tensor]]) -> None:
    """Lion as its paper writes it, on plain tensors."""
    means = [torch.zeros_like(x) for x in values]
    for of_step in gradients:
        for x, mean, g in zip(values, means, of_step, strict=True):
            decay = DECAY if x.ndim == 2 else 0.0
            update = torch.sign(0.9 * mean + 0.1 * g)
            x -= RATE * (update + decay * x)
            mean.mul_(0.99).add_(g, alpha=0.01)


def by_pytorch(make: Callable[[list[nn.Parameter], float], torch.optim.Optimizer]) -> Any:
    """Steps of one of PyTorch's optimizers, decaying matrices alone."""

    def run(values: list[torch.Tensor], gradients: list[list[torch.Tensor]]) -> None:
        parameters = [nn.Parameter(x) for x in values]
        kinds = [[p for p in parameters if (p.ndim == 2) == two] for two in (True, False)]
        made = [make(k, d) for k, d in zip(kinds, (DECAY, 0.0), strict=True)]
        for of_step in gradients:
            for parameter, gradient in zip(parameters, of_step, strict=True):
                parameter.grad = gradient.clone()
            for optimizer in made:
                optimizer.step()

    return run


def muon(parameters: list[nn.Parameter], decay: float) -> torch.optim.Optimizer:
    if all(p.ndim == 2 for p in parameters):
        return torch.optim.Muon(
            parameters, lr=RATE, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        )
    return torch.optim.AdamW(
        parameters, lr=RATE, betas=(0.9, 0.99), eps=1e-8, weight_decay=decay, fused=True
    )


def adamw8bit(parameters: list[nn.Parameter], decay: float) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(
        parameters, lr=RATE, betas=(0.9, 0.99), eps=1e-8, weight_decay=decay
    )


def require(name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


ORACLES = {
    "adamw8bit": by_pytorch(adamw8bit),
    "adamw": by_pytorch(
        lambda p, d: torch.optim.AdamW(p, lr=RATE, betas=(0.9, 0.99), eps=1e-8, weight_decay=d)
    ),
    "sgd": by_pytorch(lambda p, d: torch.optim.SGD(p, lr=RATE, momentum=0.9, weight_decay=d)),
    "adafactor": by_pytorch(lambda p, d: torch.optim.Adafactor(p, lr=RATE, weight_decay=d)),
    "muon": by_pytorch(muon),
    "lion": lion,
}


def test_each_optimizer_has_an_oracle() -> None:
    assert ORACLES.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_float32_tensors(name: str, dtype: torch.dtype) -> None:
    require(name)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    drawn = [
        [(torch.randn(x.shape, generator=generator) / 256).to(dtype) for x in start]
        for _ in range(STEPS)
    ]
    # gradients are scaled by 65536 on their way, and back
    changes = {"uses_loss_scale": dtype == torch.float16}
    trained = {f"{i}.weight": nn.Parameter(x.clone()) for i, x in enumerate(start)}
    optimizer = make_optimizer(trained, name, **changes)
    held: dict[str, Any] = {}
    for number, gradients in enumerate(drawn):
        if number == 2:
            # another optimizer goes on from what this one remembers
            held = copy.deepcopy(optimizer.state_dict())
            trained = {n: nn.Parameter(torch.zeros_like(x)) for n, x in trained.items()}
            optimizer = make_optimizer(trained, name, **changes)
            optimizer.load_state_dict(held)
        for parameter, gradient in zip(trained.values(), gradients, strict=True):
            optimizer.backward((parameter.float() * gradient).sum())
        optimizer.clip()
        optimizer.step(RATE, DECAY)
    expected = [x.float() for x in start]
    ORACLES[name](expected, [[x.float() for x in of_step] for of_step in drawn])
    for (key, found), wanted in zip(optimizer.values.items(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-6, msg=key)
        rounded = found.detach().to(dtype)
        assert (trained[key].detach() == rounded).float().mean() > 0.99


def test_a_table_of_tokens_is_left_to_adamw_by_muon() -> None:
    start = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    for name in ("emb.weight", "head.weight"):
        found = []
        for optimizer in ("muon", "adamw"):
            trained = {name: nn.Parameter(start.clone())}
            own = make_optimizer(trained, optimizer, plain=trained)
            own.backward((trained[name] * start.flip(0)).sum())
            own.clip()
            own.step(RATE, DECAY)
            found.append(own.values[name].detach())
        assert torch.equal(*found)


@pytest.fixture
def config(make_model_file: Any, make_data_file: Any, tmp_path: Path) -> TrainConfig:
    sizes = {"n_layer": 1, "n_embd": 64, "dim_att": 64, "dim_ffn": 128}
    return TrainConfig(
        load_model=str(make_model_file(**sizes)),
        data_file=str(make_data_file([f"row {i}: " + "words " * (1 + i % 3) for i in range(8)])),
        proj_dir=str(tmp_path / "whole"),
        peft="lora",
        peft_config={"r": 4},
        ctx_len=40,
        micro_bsz=2,
        epoch_count=2,
        random_seed=1,
        warmup_steps=0,
        accelerator="cpu",
        precision="bf16",
        merge=0,
    )


@pytest.mark.parametrize("name", [x for x in OPTIMIZERS if x != "adamw"])
def test_a_resumed_run_of_each_optimizer_is_one_that_never_stopped(
    name: str, config: TrainConfig, tmp_path: Path
) -> None:
    require(name)
    whole = train(replace(config, optimizer=name, val_file=config.data_file))
    assert whole.evaluations[-1].loss < whole.evaluations[0].loss
    parts = run_in_parts(replace(config, optimizer=name, val_file=config.data_file), tmp_path, 3)
    assert_same(parts.proj_dir, whole.proj_dir)


def test_an_optimizer_that_is_not_installed_is_one_line_before_training(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'rwkv-peft\[bitsandbytes\]'"):
        train(replace(config, optimizer="adamw8bit"))
    assert not Path(config.proj_dir).exists()
