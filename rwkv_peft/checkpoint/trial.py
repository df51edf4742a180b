"""Trying once, before a run, that what it is going to save can be read again and merged."""

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_peft.checkpoint.adapter import attach_adapter, to_saved
from rwkv_peft.checkpoint.folder import CONFIG, SavedAdapter, to_config, to_files
from rwkv_peft.errors import ConfigError
from rwkv_peft.methods.attach import ADAPTER, Attachment, attach_config, load_values
from rwkv_peft.methods.merge import Addition, MergedWeights
from rwkv_peft.methods.options import one_line
from rwkv_peft.models.frozen import FrozenLinear

if TYPE_CHECKING:
    from peft import PeftConfig

# what is added to a fresh adapter; how far outputs may be apart, of the largest, under TF32 too
MOVE, TOLERANCE = 0.02, 0.01
# rows of input, and width of the embedding that stands for a model's
ROWS, WIDTH = 8, 8


class _Place(NamedTuple):
    """An adapted layer of a model, and the frozen layer that stands for the one within."""

    layer: Any
    base: nn.Module


def try_cycle(model: nn.Module, attachment: Attachment) -> None:
    """Saves, reads and merges an adapter like a model's, on the smallest layer of each kind.

    In float32, in memory, and without a trace in the model or the random generators.

    Raises:
        ConfigError: a step fails, or gives other outputs than the layer that was trained.
    """
    if attachment.peft_model is None:
        return
    device = next(iter(attachment.values())).device
    config = copy.deepcopy(attachment.peft_model.peft_config[ADAPTER])
    if attachment.init:
        config.init_lora_weights = attachment.init
    try:
        with (
            torch.random.fork_rng(
                [] if device.type == "cpu" else [device], device_type=device.type
            ),
            warnings.catch_warnings(),
            one_line("a step failed"),
        ):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            places = _choose(model)
            _narrow(config, places)
            _require_same(config, places)
    except ConfigError as error:
        raise ConfigError(
            "an adapter of this --peft_config could not be saved, read and merged, as a trial on "
            f"single layers shows: {error}. Leave out the options that are meant"
        ) from error


@torch.no_grad()
def _require_same(config: "PeftConfig", places: Mapping[str, _Place]) -> None:
    """Takes an adapter through all steps, and compares outputs."""
    trained: Any = _lay_out(places)
    found: Any = _lay_out(places)
    fresh = attach_config(trained, config)
    for parameter in fresh.values():
        parameter.add_(torch.randn_like(parameter), alpha=MOVE)
    saved = to_saved(fresh, fresh)
    read = to_config(to_files(saved, "")[CONFIG])
    again = attach_adapter(found, SavedAdapter(read, saved.tensors, saved.note), "the file")
    load_values(again, saved.tensors)
    merged = MergedWeights({}, [Addition(found, again)])
    for name in merged.names:
        weight = torch.cat(list(merged.pieces(name)))
        layer, _, leaf = name.rpartition(".")
        place = places.get(layer)
        if leaf == "weight" and place and not hasattr(place.layer, "modules_to_save"):
            one, other = (m.eval().get_submodule(layer) for m in (trained, found))
            _compare(layer, place.base, weight, one, other)


def _choose(model: nn.Module) -> dict[str, _Place]:
    """The smallest adapted layer of each kind, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    smallest: dict[tuple[Any, ...], tuple[int, str, Any, Any]] = {}
    outer = ""
    for name, layer in model.named_modules():
        is_inside = outer and name.startswith(outer)
        if is_inside or not isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        outer = f"{name}."
        is_tuner = isinstance(layer, BaseTunerLayer)
        base: Any = layer.get_base_layer() if is_tuner else layer.original_module
        found = sum(p.numel() for p in base.parameters()), name, layer, base
        kind = type(layer), type(base), getattr(layer, "is_feedforward", None)
        if kind not in smallest or found[0] < smallest[kind][0]:
            smallest[kind] = found
    return {name: _Place(x, _stand_in(x, base)) for _, name, x, base in smallest.values()}


def _stand_in(layer: Any, base: Any) -> Any:
    """A float32 layer like the frozen one in all that an adapter depends on."""
    if hasattr(layer, "modules_to_save"):
        # it is trained as it is: one number for each tensor does
        device = next(base.parameters()).device
        small = {id(p): nn.Parameter(torch.zeros(1, device=device)) for p in base.parameters()}
        return copy.deepcopy(base, small)
    if isinstance(base, FrozenLinear):
        # a head has many rows more than are of use
        rows = slice(min(base.out_features, base.in_features))
        linear = FrozenLinear(base.in_features, rows.stop)
        linear.weight = nn.Parameter(base.dense(torch.float32, rows), requires_grad=False)
        return linear
    if isinstance(base, nn.Embedding):
        return nn.Embedding(base.num_embeddings, WIDTH, device=base.weight.device)
    return copy.deepcopy(base).float()


def _narrow(config: "PeftConfig", places: Mapping[str, _Place]) -> None:
    """Makes a config name these layers alone."""
    wanted: dict[str, list[str]] = {"target_modules": [], "modules_to_save": []}
    wanted |= {"target_parameters": [], "feedforward_modules": []}
    for name, (layer, _) in places.items():
        if hasattr(layer, "parameter_name"):
            wanted["target_parameters"].append(f"{name}.{layer.parameter_name}")
        elif hasattr(layer, "modules_to_save"):
            wanted["modules_to_save"].append(name)
        elif hasattr(layer, "get_base_layer"):
            wanted["target_modules"].append(name)
            if getattr(layer, "is_feedforward", False):
                wanted["feedforward_modules"].append(name)
    for field, names in wanted.items():
        if getattr(config, field, None) is not None:
            # IA3 asks for a list, if an empty one
            setattr(config, field, names if names or field == "feedforward_modules" else None)
    if hasattr(config, "exclude_modules"):
        vars(config)["exclude_modules"] = None


def _lay_out(places: Mapping[str, _Place]) -> nn.Module:
    """A model of stand-ins under their names, with weights of its own: attaching may alter them."""
    model = nn.Module()
    for name, (_, base) in places.items():
        *outer, leaf = name.split(".")
        parent = model
        for part in outer:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, copy.deepcopy(base).requires_grad_(False))
    return model


def _compare(
    name: str, base: nn.Module, weight: Tensor, trained: nn.Module, found: nn.Module
) -> None:
    """Compares the outputs of a layer, of the one that was read and of the merged weight."""
    if isinstance(base, nn.Embedding):
        x = torch.arange(ROWS, device=weight.device) % base.num_embeddings
        merged = weight[x]
    elif isinstance(base, FrozenLinear):
        x = torch.randn(ROWS, base.in_features, device=weight.device)
        merged = x @ weight.T
    else:
        return
    wanted = trained(x)
    for step, y in (("reading", found(x)), ("merging", merged)):
        if not bool((y - wanted).abs().max() <= TOLERANCE * wanted.abs().max()):
            raise ConfigError(f"{name} has other outputs after {step} it")
