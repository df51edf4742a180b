import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import rwkv_peft
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.batching import IGNORE, Batch
from rwkv_peft.device import own_stream
from rwkv_peft.errors import ConfigError
from rwkv_peft.methods.attach import attach
from rwkv_peft.methods.state import LearnedStates
from rwkv_peft.models.compile import compile_blocks
from rwkv_peft.training import choose as choosing
from rwkv_peft.training import choose_device
from rwkv_peft.training.graphs import HEAD_PARTS, GraphedStep, Inputs
from rwkv_peft.training.prepare import compile_model, find_facts
from rwkv_peft.training.run import train
from rwkv_peft.training.step import full_step
from tests.models.test_versions import VERSIONS, make_segment_ids

CPU = torch.device("cpu")
# the compiler asks every tensor for its gradient, and the warning of those that keep none is not
# shown outside of tests
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def make_batch(rows: int, length: int, *, packed: bool, share: float = 0.5, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, 320, (rows, length + 1), generator=generator)
    is_trained = torch.rand(rows, length, generator=generator) < share
    weights = torch.rand(rows, length, generator=generator) + 0.5
    return Batch(
        drawn[:, :-1],
        drawn[:, 1:].where(is_trained, IGNORE),
        [1],
        weights=weights.where(is_trained, 0) if packed else None,
        segment_ids=make_segment_ids(rows, length) if packed else None,
    )


def gradients(step: Any, model: Any, trained: Any, batch: Batch, state: Any = None) -> Any:
    for parameter in trained.values():
        parameter.grad = None
    given = state() if state else None
    output = step(
        model, batch, state=given, divisor=max(1.0, batch.weight), l2wrap=1e-3, backward=BACKWARD
    )
    return output, {name: x.grad.clone() for name, x in trained.items() if x.grad is not None}


BACKWARD = torch.Tensor.backward


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("packed", [False, True])
def test_padding_and_filled_up_positions_change_no_gradient(
    packed: bool, share: float, model_file: Path
) -> None:
    model = rwkv_peft.load_model(model_file, dtype="float64")
    trained = attach(model, "none", {})
    step = GraphedStep(CPU, 96, is_captured=False)
    for length in (5, 70, 96):
        batch = make_batch(2, length, packed=packed, share=share)
        expected, exact = gradients(full_step, model, trained, batch)
        output, found = gradients(step, model, trained, batch)
        assert output.num_tokens == expected.num_tokens
        torch.testing.assert_close(output.loss_sum, expected.loss_sum, rtol=1e-12, atol=1e-12)
        for name, x in exact.items():
            torch.testing.assert_close(found[name], x, rtol=1e-9, atol=1e-12, msg=name)


def test_states_get_their_gradients(model_file: Path) -> None:
    model = rwkv_peft.load_model(model_file)
    states = LearnedStates(model, ["a", "b"])
    for parameter in states.values():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = make_batch(2, 33, packed=False)
    step = GraphedStep(CPU, 64, is_captured=False)
    found, expected = (
        gradients(s, model, states, batch, lambda: states.rows(["b", "a"]))[1]
        for s in (step, full_step)
    )
    assert found.keys() == expected.keys() == states.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-7)


def test_few_shapes_come_and_none_is_longer_than_a_row() -> None:
    shapes = set()
    for length in range(1, 513):
        batch = make_batch(1, length, packed=False, seed=length, share=(length % 10) / 9)
        inputs = Inputs.of(batch, 500, 1.0)
        width = inputs.tokens.shape[1]
        assert length <= width <= max(length, min(500, length * 5 // 4 + 16))
        trained = torch.arange(width) if inputs.trained is None else inputs.trained
        assert len(trained.unique()) == len(trained) == len(inputs.targets)
        assert inputs.weights.count_nonzero() == batch.num_trained
        shapes.add((width, len(trained)))
    assert len({width for width, _ in shapes}) <= 32
    assert len(shapes) <= 32 * HEAD_PARTS


@pytest.mark.parametrize(
    ("settings", "captures"),
    [
        ({"peft": "lora"}, 1),
        ({"peft": "pissa"}, 1),
        ({"peft": "state"}, 1),
        ({"peft": "none"}, 1),
        ({"peft": "adalora"}, 0),
        ({"peft": "vera"}, 0),
        ({"peft": "adalora", "cuda_graph": 1}, 1),
        ({"peft": "lora", "quant": "nf4"}, 1),
        ({"peft": "lora", "cuda_graph": 0}, 0),
        ({"train_type": "infctx"}, 1),
    ],
)
def test_what_was_compared_on_a_gpu_is_captured_where_a_device_can(
    settings: Any,
    captures: int,
    model_file: Path,
    data_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = TrainConfig(
        load_model=str(model_file), data_file=str(data_file), accelerator="cpu", **settings
    )
    facts = find_facts(config, read_weights(model_file))
    if "cuda_graph" not in settings:
        assert choosing.choose(config, facts).settings.cuda_graph == 0
    monkeypatch.setattr(choose_device, "has_graphs", lambda device: True)
    assert choosing.choose(config, facts).settings.cuda_graph == captures


def test_what_this_machine_lacks_is_refused_if_it_is_asked_for(
    model_file: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(load_model=str(model_file), data_file=str(data_file), accelerator="cpu")
    facts = find_facts(config, read_weights(model_file))
    with pytest.raises(ConfigError, match="--cuda_graph 1 is not for cpu: give --cuda_graph 0"):
        choosing.choose(replace(config, cuda_graph=1), facts)
    monkeypatch.setattr(choose_device, "missing_compiler", lambda device: "a C compiler")
    with pytest.raises(ConfigError, match="--compile 1 needs a C compiler: install it, or give"):
        choosing.choose(replace(config, compile=1), facts)


gpu = pytest.mark.gpu


def load(path: Path, method: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = rwkv_peft.load_model(path, device="cuda", dtype="bfloat16").train()
    options = {} if method == "none" else {"r": 4}
    trained = dict(attach(model, method, options))  # type: ignore[arg-type]
    generator = torch.Generator(device).manual_seed(0)
    for parameter in trained.values():
        if not parameter.any():
            parameter.data.normal_(0, 0.02, generator=generator)
    return model, trained


def require_captured_bits(model: Any, trained: dict[str, Any], batches: list[Batch]) -> None:
    """Fails unless a graph gives the losses and gradients of the same kernels without one."""
    device, ctx_len = torch.device("cuda"), 512
    with own_stream(device):
        plain = GraphedStep(device, ctx_len, is_captured=False)
        expected = [gradients(plain, model, trained, batch) for batch in batches]
        step = GraphedStep(device, ctx_len)
        for parameter in trained.values():
            parameter.grad = None
        for batch, (output, exact) in zip(batches, expected, strict=True):
            for parameter in trained.values():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            found = step(
                model,
                batch,
                state=None,
                divisor=batch.weight,
                l2wrap=1e-3,
                backward=BACKWARD,
            )
            assert torch.equal(found.loss_sum, output.loss_sum)
            for key, x in exact.items():
                assert torch.equal(trained[key].grad, x), key
        assert step.num_graphs == 1


@gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", ["lora", "miss", "none"])
@pytest.mark.parametrize("name", ["5.2", "6", "7"])
def test_a_graph_gives_the_bits_of_its_kernels(
    name: str, method: str, packed: bool, make_model_file: Callable[..., Path]
) -> None:
    model, trained = load(make_model_file(**VERSIONS[name]), method)
    batches = [make_batch(2, 70, packed=packed, seed=seed) for seed in range(5)]
    require_captured_bits(model, trained, batches)


@gpu
def test_compiled_blocks_over_many_rows_have_the_gradients_of_plain_ones(
    make_model_file: Callable[..., Path],
) -> None:
    # from 4096 rows on, twice as many as columns, the compiler had one kernel for sums over both
    path = make_model_file(n_embd=2048, dim_att=2048, dim_ffn=8192)
    batch, found = make_batch(1, 4096, packed=False), []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        model, trained = load(path, "none")
        if is_compiled:
            compile_blocks(model)
        with own_stream(torch.device("cuda")):
            found.append(gradients(full_step, model, trained, batch)[1])
    plain, compiled = found
    for name, x in plain.items():
        assert (compiled[name] - x).norm() <= 0.1 * x.norm() + 1e-4, name


@pytest.fixture
def config(make_model_file: Callable[..., Path], data_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        load_model=str(make_model_file()),
        data_file=str(data_file),
        proj_dir=str(tmp_path / "plain"),
        dataload="pad",
        peft="lora",
        peft_config={"r": 4, "lora_alpha": 8},
        epoch_count=20,
        lr_init=1e-3,
        precision="bf16",
        accelerator="gpu",
        random_seed=0,
        compile=0,
        cuda_graph=0,
    )


def losses(config: TrainConfig, tmp_path: Path, name: str, **changes: Any) -> list[float]:
    result = train(replace(config, proj_dir=str(tmp_path / name), **changes))
    assert "cannot be" not in (result.proj_dir / "train_log.txt").read_text()
    lines = (result.proj_dir / "loss_data.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dataload": "pack", "ctx_len": 128},
        {"peft_config": {"r": 4, "lora_dropout": 0.3}},
        {"grad_cp": 1},
        {"accumulate_grad_batches": 3},
        {"peft": "state", "peft_config": {}, "lr_init": 0.1},
        {"peft": "none", "peft_config": {}},
        {"precision": "fp16"},
        {"peft": "adalora"},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_a_captured_run_is_near_the_plain_one_and_repeats_bit_for_bit(
    changes: dict[str, Any], config: TrainConfig, tmp_path: Path
) -> None:
    plain = losses(config, tmp_path, "plain", **changes)
    captured = losses(config, tmp_path, "captured", cuda_graph=1, **changes)
    assert captured == losses(config, tmp_path, "again", cuda_graph=1, **changes)
    for one, other in zip(captured, plain, strict=True):
        assert abs(one - other) <= 0.01 * other


@gpu
@pytest.mark.parametrize("dataload", ["pack", "pad"])
def test_a_compiled_and_captured_run_is_near_the_plain_one_and_compiles_nothing_later(
    dataload: Any, config: TrainConfig, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    counters.clear()
    options = {
        "dataload": dataload,
        "ctx_len": 128,
        "epoch_count": 200 if dataload == "pack" else 20,
    }
    plain = losses(config, tmp_path, "plain", **options)
    fast = losses(config, tmp_path, "fast", compile=1, cuda_graph=1, **options)
    lengths = 1 if dataload == "pack" else 4
    # of the first block, of the others, and of the loss for few and for many rows
    assert counters["stats"]["unique_graphs"] <= 4 * lengths
    assert len(plain) >= 200
    assert fast == losses(config, tmp_path, "again", compile=1, cuda_graph=1, **options)
    for one, other in zip(fast, plain, strict=True):
        assert abs(one - other) <= 0.05


@gpu
@pytest.mark.parametrize("peft", ["lora", "none"])
def test_a_compiled_and_captured_run_that_is_resumed_is_one_that_never_stopped(
    peft: Any, config: TrainConfig, tmp_path: Path
) -> None:
    options = {"peft_config": {"r": 4, "lora_dropout": 0.1}} if peft == "lora" else {}
    torch._dynamo.reset()
    config = replace(config, peft=peft, peft_config={}, compile=1, cuda_graph=1, epoch_count=4)
    config = replace(config, save_every_steps=7, keep=0, **options)
    found = losses(config, tmp_path, "out")
    written = (tmp_path / "out" / "rwkv-3.pth").read_bytes()
    checkpoint = tmp_path / "out" / "checkpoints" / "step-000007"
    assert losses(config, tmp_path, "out", resume=str(checkpoint)) == found
    assert (tmp_path / "out" / "rwkv-3.pth").read_bytes() == written


def test_blocks_that_draw_again_what_they_drew_are_not_compiled(
    make_model_file: Callable[..., Path],
) -> None:
    torch.manual_seed(0)
    model = rwkv_peft.load_model(make_model_file(), dtype="float64")
    trained = dict(attach(model, "lora", {"r": 4, "lora_dropout": 0.5}))
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.02)
    model.train()
    batch, remarks, found = make_batch(1, 24, packed=False), [], []
    for is_recomputed, asks in ((False, False), (True, True)):
        model.grad_cp = is_recomputed
        if asks:
            compile_model(model, remarks)
        torch.manual_seed(1)
        found.append(gradients(full_step, model, trained, batch)[1])
    assert "dropout" in remarks[0]
    for name, x in found[0].items():
        torch.testing.assert_close(found[1][name], x, rtol=1e-9, atol=1e-12)
    model.grad_cp = False
    compile_model(model, remarks)
    assert model.is_compiled
    assert len(remarks) == 1
