"""How far each form of stored weights moves a model's logits.

    python benchmarks/quant_error.py [--model FILE] [--layers 4] [--width 2048] [--output FILE]

Two models, in float32, with their projections as they are and as each form stores them:

*the bundled model*, or another file, on the bundled dialogues kept aside;

*a set of layers* of 1.5B's width (2048, feed-forward 8192), which are like trained ones: each
projection has the singular values of the bundled model's projection of that name and depth,
stretched to its size, between random orthogonal bases; the norms of its rows and columns are spread
by factors whose logarithms are normal, as wide as there; one column in a thousand is ten times as
large, as the outlier features of larger models are. All else is a fresh model's, and the tokens are
random.

*logits*: the root of the mean square of what they change by, relative to that of the logits about
their mean at each token. *KL*: mean Kullback-Leibler divergence of the next token in nats from the
exact model. *same top*: tokens whose likeliest successor stays. *weights*: the norm of what storing
takes from the projections, relative to theirs. A figure is printed only if the model with its exact
weights laid in the same way has the very logits of the exact one.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from report import report
from torch import Tensor

from rwkv_peft import Tokenizer
from rwkv_peft.assets import BASE_MODEL, HELD_OUT_DIALOGUES
from rwkv_peft.checkpoint.pth import infer_model_config, load_weights, read_weights
from rwkv_peft.models import build
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.models.initial import fresh_model
from rwkv_peft.quant import STORAGES, Storage, round_trip, stored_layers

DOCUMENTS, ROWS, TOKENS = 50, 2, 256
OUTLIERS, LARGER = 1000, 10.0


def trained_like(shape: tuple[int, int], example: Tensor, generator: torch.Generator) -> Tensor:
    """A weight of this shape that has what the module's docstring says of the example."""
    rows, columns = shape
    values = torch.linalg.svdvals(example)
    places = torch.linspace(0, len(values) - 1, min(shape))
    low = places.long().clamp(max=len(values) - 2)
    spectrum = torch.lerp(values[low], values[low + 1], places - low)
    bases = [torch.linalg.qr(torch.randn(n, min(shape), generator=generator))[0] for n in shape]
    weight = bases[0] * spectrum @ bases[1].T
    for dim, count in ((1, rows), (0, columns)):
        spread = example.norm(dim=dim).clamp(min=1e-6).log().std()
        factors = (torch.randn(count, generator=generator) * spread).exp()
        if dim == 0:
            factors[torch.randperm(columns, generator=generator)[: columns // OUTLIERS]] *= LARGER
        weight *= factors.unsqueeze(dim)
    # as large as a unit of input asks for, whatever the size
    return weight * (example.norm() / math.sqrt(len(example))) / (weight.norm() / math.sqrt(rows))


def layer_set(layers: int, width: int) -> tuple[dict[str, Tensor], Tensor]:
    """Weights of such a model, and random tokens (ROWS, TOKENS)."""
    bundled = read_weights(BASE_MODEL)
    deep = infer_model_config(bundled)
    sizes = ModelConfig(
        version="x070", n_layer=layers, n_embd=width, dim_att=width, dim_ffn=4 * width,
        head_size=64, vocab_size=deep.vocab_size, ranks={}, has_first_value_mix=False,
    )  # fmt: skip
    config, weights = fresh_model(sizes, 0)
    generator = torch.Generator().manual_seed(0)
    # an embedding of official pre-training is tiny at first, and grows
    weights["emb.weight"] = torch.randn(weights["emb.weight"].shape, generator=generator)
    for name, layer in stored_layers(build(config, op="reference")):
        _, at, rest = name.split(".", 2)
        depth = round(int(at) * (deep.n_layer - 1) / max(layers - 1, 1))
        example = bundled[f"blocks.{depth}.{rest}.weight"].float()
        shape = layer.out_features, layer.in_features
        weights[f"{name}.weight"] = trained_like(shape, example, generator)
    return weights, torch.randint(config.vocab_size, (ROWS, TOKENS), generator=generator)


def held_out_tokens(vocab_size: int) -> list[Tensor]:
    """The tokens (1, T) of each of the bundled dialogues kept aside."""
    lines = HELD_OUT_DIALOGUES.read_text(encoding="utf-8").splitlines()[:DOCUMENTS]
    tokenizer = Tokenizer(vocab_size)
    return [torch.tensor([tokenizer.encode(json.loads(line)["text"])]) for line in lines]


@torch.inference_mode()
def logits_of(weights: Mapping[str, Tensor], texts: list[Tensor]) -> list[Tensor]:
    """Logits (T, V) of each text."""
    model = build(infer_model_config(weights), op="torch")
    load_weights(model, weights)
    return [model(tokens)[0].flatten(0, 1) for tokens in texts]


def measure(weights: Mapping[str, Tensor], texts: list[Tensor]) -> Iterator[str]:
    """A row of the table for each form."""
    names = {f"{n}.weight" for n, _ in stored_layers(build(infer_model_config(weights)))}
    exact = logits_of(weights, texts)
    wanted = torch.cat(exact)
    centred = (wanted - wanted.mean(1, keepdim=True)).norm()
    forms: dict[str, Callable[[Tensor], Tensor]] = {"exact": torch.clone}
    for name in STORAGES:
        storage = Storage(name, torch.float32)
        forms[name] = lambda x, storage=storage: round_trip(x, storage)  # type: ignore[misc]
    for name, change in forms.items():
        made = {n: change(x.float()) if n in names else x for n, x in weights.items()}
        found = torch.cat(logits_of(made, texts))
        if name == "exact":
            if not torch.equal(found, wanted):
                raise SystemExit("the exact weights laid anew give other logits")
            continue
        lost = math.hypot(*(float((made[n] - weights[n].float()).norm()) for n in names))
        whole = math.hypot(*(float(weights[n].float().norm()) for n in names))
        off = found - wanted
        off = (off - off.mean(1, keepdim=True)).norm() / centred
        p, q = wanted.log_softmax(1), found.log_softmax(1)
        kl = (p.exp() * (p - q)).sum(1).mean()
        same = (wanted.argmax(1) == found.argmax(1)).float().mean()
        yield (
            f"| {name} | {lost / whole:.2%} | {float(off):.2%} | {float(kl):.2g} | "
            f"{float(same):.1%} |"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=BASE_MODEL)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    weights = read_weights(options.model)
    config = infer_model_config(weights)
    texts = held_out_tokens(config.vocab_size)
    made, tokens = layer_set(options.layers, options.width)
    models = (
        (f"{options.model.name} ({config.n_layer} layers of {config.n_embd}), "
         f"{sum(x.numel() for x in texts):,} tokens of dialogues", weights, texts),
        (f"{options.layers} layers of {options.width}, like trained ones, "
         f"{tokens.numel():,} random tokens", made, list(tokens[:, None])),
    )  # fmt: skip
    lines = ["# Error of stored weights", ""]
    lines += [f"{platform.machine()}, torch {torch.__version__}, float32", ""]
    for title, given, asked in models:
        lines += [f"{title}:", "", "| form | weights | logits | KL | same top |"]
        lines += ["|---|---|---|---|---|", *measure(given, asked), ""]
    report(lines, options.output)


if __name__ == "__main__":
    main()
