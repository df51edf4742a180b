"""What a step asks of a device, beside PyTorch's own count of its products."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rwkv_peft.config import TrainConfig
from rwkv_peft.data.batching import Batch
from rwkv_peft.training.flops import count_flops, measure_rate
from rwkv_peft.training.metrics import StepRecord
from rwkv_peft.training.prepare import prepare_run
from rwkv_peft.training.reporter import Reporter, describe_step


class Counter(TorchDispatchMode):
    """Adds up what PyTorch says of each product."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        # adds to its first argument, and is not in the table
        packet = torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet
        if count := flop_registry.get(packet):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("peft", ["none", "lora", "state"])
def test_operations_of_a_step_are_those_that_pytorch_counts(
    peft: Any, make_model_file: Callable[..., Path], data_file: Path
) -> None:
    options = {"peft_config": {"r": 8}} if peft == "lora" else {}
    config = TrainConfig(
        load_model=str(make_model_file()),
        data_file=str(data_file),
        peft=peft,
        ctx_len=64,
        micro_bsz=1,
        epoch_count=1,
        precision="fp32",
        accelerator="cpu",
        op="reference",
        dataload="pad" if peft == "state" else "pack",
        loss_mask="none",
        **options,
    )
    run, _ = prepare_run(config)
    # every position meets the head
    tokens = torch.randint(1, 300, (1, 65), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], [1], states=[""] if peft == "state" else None)
    run.model.train()
    with Counter() as counter:
        run.step(
            run.model,
            batch,
            state=run.target.initial_state(batch),
            divisor=1.0,
            l2wrap=0.0,
            backward=run.optimizer.backward,
        )
    # the first block's input needs no gradient, and the recurrence is no product of these
    assert counter.total / batch.tokens.numel() == pytest.approx(count_flops(run), rel=0.1)


def test_a_device_that_does_nothing_but_products_has_a_share_of_one() -> None:
    record = StepRecord(1, 0, 1.0, 0.1, 1.0, 500, 400, 2.0, 0.25, 0)
    assert describe_step(record, 1000.0)["speed/mfu"] == 0.25
    assert "speed/mfu" not in describe_step(record)
    assert measure_rate(torch.device("cpu"), torch.float32) is None


def test_the_rate_of_a_device_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, float]] = []
    logger = SimpleNamespace(log=lambda values, step: found.append(values), close=lambda: None)
    monkeypatch.setattr("rwkv_peft.training.reporter.LOGGERS", {"a": lambda *_: logger})
    calls: list[Any] = []

    def rate(*device: Any) -> float:
        calls.append(device)
        return 4e6

    monkeypatch.setattr("rwkv_peft.training.reporter.measure_rate", rate)
    monkeypatch.setattr("rwkv_peft.training.reporter.count_flops", lambda run: 1000.0)
    settings = SimpleNamespace(dtype=torch.float32, num_ranks=2)
    run: Any = SimpleNamespace(settings=settings, device=torch.device("cpu"), validation=None)
    reporter = Reporter(["a"], print)
    for step in (1, 2):
        reporter.after_step(run, StepRecord(step, 0, 1.0, 0.1, 1.0, 500, 400, 2.0, 0.25, 0))
    assert len(calls) == 1
    # 250 tokens a second of 8,000 that two devices could take
    assert [x["speed/mfu"] for x in found] == [250 / 8000] * 2
