"""A method that is attached before the weights of blocks are loaded begins as one after it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rwkv_peft.checkpoint.pth import infer_model_config, load_weights, read_weights
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.methods.attach import Attachment, attach
from rwkv_peft.methods.stored import REFUSED
from rwkv_peft.models import build
from rwkv_peft.models.awaited import AwaitedLinear, load_awaited
from rwkv_peft.models.base import RWKV
from rwkv_peft.quant import Storage, find_storage
from rwkv_peft.training.load import await_blocks
from tests.methods.test_catalog import CASES as CATALOG

TOKENS = torch.arange(1, 25).view(1, 24)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **CATALOG,
    "none": ("none", {}),
    "dora": ("lora", {"r": 4, "use_dora": True}),
    "olora": ("lora", {"r": 4, "init_lora_weights": "olora"}),
    "pissa by SVD": ("lora", {"r": 4, "init_lora_weights": "pissa", "use_rslora": True}),
    "kasa": ("lora", {"r": 4, "kasa_config": {}}),
    "a parameter": ("lora", {"target_modules": [], "target_parameters": ["att.key.weight"]}),
    "a copy": ("lora", {"r": 4, "target_modules": ["att.key"], "modules_to_save": ["ffn"]}),
}
# which load the blocks first, as they change or copy weights
LOADING = (*REFUSED, "kasa", "a parameter", "a copy")


def make_model(path: Path, storage: Storage | None, *, awaits: bool) -> RWKV:
    weights = read_weights(path)
    model = build(infer_model_config(weights), op="torch")
    if awaits:
        settings: Any = SimpleNamespace(dtype=torch.float32, load_model=str(path))
        facts: Any = SimpleNamespace(device=torch.device("cpu"))
        await_blocks(model, settings, facts, weights, storage)
    load_weights(model, weights, storage=storage)
    return model


def awaited(model: RWKV) -> int:
    return sum(isinstance(layer, AwaitedLinear) for layer in model.modules())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("case", CASES)
def test_a_method_begins_the_same_on_weights_that_are_still_in_their_file(
    case: str, quant: str, make_model_file: Callable[..., Path]
) -> None:
    method, options = CASES[case]
    path = make_model_file(n_layer=2)
    storage = None if quant == "none" else Storage(quant, torch.float32)
    found: list[tuple[RWKV, Attachment]] = []
    for awaits in (False, True):
        model = make_model(path, storage, awaits=awaits)
        own = {n: p for n, p in model.named_parameters() if n.endswith("key.weight")}
        assert find_storage(model) == storage and awaited(model) == awaits * 12
        torch.manual_seed(1)
        if storage and case in LOADING:
            with pytest.raises(ConfigError, match="--quant"):
                attach(model, method, options, weights=read_weights(path))
            return
        trained = attach(model, method, options, weights=read_weights(path))
        assert bool(awaited(model)) == (awaits and case not in LOADING)
        load_awaited(model)
        if case not in ("a parameter", "a copy", "osf"):
            # who knew a weight before knows it still
            now = {id(p) for p in model.parameters()}
            assert all(id(p) in now for p in own.values())
        found.append((model, trained))
    (model, trained), (other, again) = found
    assert trained.keys() == again.keys() and trained.start.keys() == again.start.keys()
    for name, x in trained.start.items():
        assert torch.equal(again.start[name], x), name
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    there = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert wanted.keys() == there.keys()
    for name, x in wanted.items():
        assert torch.equal(there[name], x) and there[name].dtype == x.dtype, name
    assert list(map(type, model.modules())) == list(map(type, other.modules()))
    with torch.inference_mode():
        assert torch.equal(other.eval()(TOKENS)[0], model.eval()(TOKENS)[0])


def test_a_weight_that_is_trained_beside_an_adapter_is_loaded(
    make_model_file: Callable[..., Path],
) -> None:
    model = make_model(make_model_file(n_layer=2), None, awaits=True)
    trained = attach(model, "lora", {"target_modules": ["key"]}, train_parts=["att.value"])
    assert trained["blocks.0.att.value.weight"].abs().max() > 0
    assert not isinstance(model.get_submodule("blocks.0.att.value"), AwaitedLinear)
    # keys of both mixings, and all that is not named
    assert awaited(model) == 10


def test_a_weight_that_is_not_finite_is_named_when_it_is_read(
    make_model_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_model_file(n_layer=2)
    weights = {name: x.clone() for name, x in read_weights(path).items()}
    weights["blocks.1.ffn.key.weight"][3, 5] = torch.nan
    torch.save(weights, tmp_path / "broken.pth")
    model = make_model(tmp_path / "broken.pth", None, awaits=True)
    load_awaited(model.blocks[0])
    with pytest.raises(CheckpointError, match=r"NaN or infinity in blocks\.1\.ffn\.key\.weight: "):
        load_awaited(model.blocks[1])
