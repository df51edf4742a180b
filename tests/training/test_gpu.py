import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.device import own_stream
from rwkv_peft.training.run import train
from rwkv_peft.training.step import StepOutput, full_step
from tests.training.test_loop import losses
from tests.training.test_optim import make_optimizer
from tests.training.test_resume import assert_same, run_in_parts


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("peft", ["lora", "none"])
def test_a_run_on_a_gpu_learns_and_its_file_opens_without_one(
    peft: str,
    precision: str,
    make_model_file: Callable[..., Path],
    data_file: Path,
    tmp_path: Path,
) -> None:
    config = TrainConfig(
        load_model=str(make_model_file()),
        data_file=str(data_file),
        proj_dir=str(tmp_path / "out"),
        dataload="pad",
        peft=peft,  # type: ignore[arg-type]
        epoch_count=6,
        lr_init=1e-3,
        precision=precision,  # type: ignore[arg-type]
        accelerator="gpu",
        op="torch",
        random_seed=0,
    )
    result = train(config)
    found = losses(tmp_path / "out")
    assert result.steps == len(found)
    assert result.loss < 0.96 * found[0]
    assert result.weights is not None
    raw = torch.load(result.weights, weights_only=True)
    assert {x.device.type for x in raw.values()} == {"cpu"}
    assert all(x.isfinite().all() for x in read_weights(result.weights).values())


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["torch", "auto"])
def test_on_a_gpu_too_recomputing_blocks_changes_no_bit_and_draws_the_same_dropout(
    op: str, make_model_file: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    def losses_of(name: str, grad_cp: int, rate: float) -> list[float]:
        config = TrainConfig(
            load_model=str(make_model_file()),
            data_file=str(data_file),
            proj_dir=str(tmp_path / name),
            dataload="pad",
            peft_config={"r": 4, "lora_dropout": rate},
            grad_cp=grad_cp,
            epoch_count=2,
            lr_init=1e-2,
            precision="bf16",
            accelerator="gpu",
            op=op,
            random_seed=0,
        )
        train(config)
        return losses(tmp_path / name)

    kept, recomputed = losses_of("kept", 0, 0.3), losses_of("recomputed", 1, 0.3)
    assert kept == recomputed
    assert kept != losses_of("without", 0, 0.0)


@pytest.mark.gpu
def test_on_a_gpu_too_a_state_that_no_row_of_a_step_has_does_not_move(
    make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"text": f"row {i} of one", "state": "one"} for i in range(4)]
    rows += [{"text": f"row {i} of two", "state": "two"} for i in range(4)]

    def states_of(name: str, own: list[dict[str, str]]) -> dict[str, dict[str, torch.Tensor]]:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
        config = TrainConfig(
            load_model=str(make_model_file()),
            data_file=str(data),
            proj_dir=str(tmp_path / name),
            peft="state",
            data_shuffle=0,
            micro_bsz=2,
            epoch_count=1,
            lr_init=1e-2,
            lr_final=1e-2,
            precision="bf16",
            accelerator="gpu",
            random_seed=0,
        )
        result = train(config)
        assert result.weights is not None
        return {p.stem: read_weights(p) for p in result.weights.parent.glob("rwkv-0*.pth")}

    together = states_of("together", rows)
    for name, own in (("one", rows[:4]), ("two", rows[4:])):
        alone = states_of(name, own)[f"rwkv-0-{name}"]
        for key, value in alone.items():
            assert value.abs().max() > 1e-3
            torch.testing.assert_close(together[f"rwkv-0-{name}"][key], value, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_a_micro_batch_waits_for_nothing_on_a_gpu(
    model_file: Path, data_file: Path, tmp_path: Path
) -> None:
    calls = 0
    # a prototype, as PyTorch says: it sees what waits by a copy or a read, which is meant here
    warnings.filterwarnings("ignore", message="Synchronization debug mode")

    def strict(*args: Any, **options: Any) -> StepOutput:
        nonlocal calls
        calls += 1
        # kernels are compiled and memory is found in the first
        torch.cuda.set_sync_debug_mode("error" if calls > 2 else "default")
        try:
            return full_step(*args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    config = TrainConfig(
        load_model=str(model_file),
        data_file=str(data_file),
        proj_dir=str(tmp_path / "out"),
        peft_config={"r": 4, "lora_dropout": 0.1},
        ctx_len=48,
        micro_bsz=2,
        epoch_count=3,
        accelerator="gpu",
    )
    assert train(config, step=strict).signal == 0
    assert calls > 6


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lora", "dropout", "miss", "none", "pissa", "fp16"])
def test_on_a_gpu_too_a_run_stopped_twice_ends_with_the_bits_of_one_that_never_was(
    name: str, make_model_file: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    options: dict[str, dict[str, Any]] = {
        "lora": {"peft": "lora"},
        "dropout": {"peft": "lora", "peft_config": {"r": 8, "lora_dropout": 0.2}},
        "miss": {"peft": "miss"},
        "none": {"peft": "none"},
        "pissa": {"peft": "pissa", "peft_config": {"r": 8}},
        "fp16": {"peft": "lora", "precision": "fp16", "op": "torch"},
    }
    config = TrainConfig(
        **{"precision": "bf16", "peft_config": {}, **options[name]},
        load_model=str(make_model_file()),
        data_file=str(data_file),
        proj_dir=str(tmp_path / "whole"),
        ctx_len=64,
        micro_bsz=2,
        epoch_count=4,
        lr_init=1e-2,
        accelerator="gpu",
        compile="auto" if name in ("dropout", "fp16") else 1,
        merge=0,
        random_seed=0,
    )
    whole = train(config)
    run_in_parts(config, tmp_path, 2, 5)
    assert whole.steps > 6
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.gpu
def test_moments_of_8_bits_wait_for_the_stream_of_training() -> None:
    found = []
    for is_late in (False, True):
        parameter = torch.nn.Parameter(torch.ones(1 << 20, device="cuda", dtype=torch.bfloat16))
        optimizer = make_optimizer({"x": parameter}, optimizer="adamw8bit", accumulates=False)
        factors = torch.linspace(-1, 1, 1 << 20, device="cuda", dtype=torch.bfloat16)
        with own_stream(torch.device("cuda")):
            for _ in range(3):
                if is_late:
                    # some 50 ms, so that who does not wait reads what is not yet there
                    torch.cuda._sleep(10**8)
                optimizer.backward((parameter * factors).float().sum())
                optimizer.clip()
                optimizer.step(lr=0.01)
        torch.cuda.synchronize()
        found.append(optimizer.values["x"])
    assert torch.equal(*found)
    assert (found[0] < 1).any()
