"""How far the answers of a merged file are from those of the adapter model."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rwkv_peft.config import DataConfig
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.models.base import RWKV

TEXTS = (
    "User: Why does the moon keep one face to the earth?\n\nAssistant: Over ages the tides slowed "
    "its turning, until one turn took as long as one round of its orbit.",
    "User: 为什么天空是蓝色的？\n\nAssistant: 阳光穿过大气时，蓝光比红光更容易被空气分子散射，"
    "所以我们抬头看到的天空是蓝色的。",
)
# ids of the texts: the tokenizer's tables would take more memory than a mapped model
IDS = (
    "24281 59 21152 30659 22590 31456 31205 22226 30807 4811 22590 38329 64 261 5585 41693 59 "
    "29521 30118 22590 32243 116 47312 21902 53210 45 40076 22226 32321 32272 4423 31323 4423 "
    "22226 39551 4706 21902 39187 47",
    "24281 59 33 10292 10373 10303 11639 15090 13091 16155 15898 14734 19156 261 5585 41693 59 33 "
    "17772 10659 15091 17141 11638 13655 13064 19137 16155 10659 13637 15446 10659 13179 11922 "
    "13080 16443 15090 13655 10768 11855 13001 11965 19137 12631 10399 12605 10402 12690 11647 "
    "14791 10792 14734 11639 15090 13091 16155 15898 14734 10080",
)
# a divergence of k nats costs k nats of loss a token on the adapter model's own text
TOLERABLE_KL = 0.01
TOLERABLE_AGREEMENT = 0.9
# most tokens of one document, so that several are drawn; positions whose logits exist at a time
LONGEST, POSITIONS = 64, 64


@dataclass(frozen=True, slots=True)
class Comparison:
    """Answers of the merged file against those of the adapter model, both computed in float32.

    Attributes:
        text: where the tokens come from.
        tokens: how many positions were compared.
        max_difference, mean_difference: of logits, absolute.
        kl: divergence of the merged file's distribution from the adapter model's, nats a token.
        top1_agreement: share of positions at which both find the same token likeliest.
    """

    text: str
    tokens: int
    max_difference: float
    mean_difference: float
    kl: float
    top1_agreement: float

    @property
    def is_far(self) -> bool:
        """Whether a user would notice."""
        # true for a divergence that is NaN too, of which no comparison holds
        return not (self.kl <= TOLERABLE_KL and self.top1_agreement >= TOLERABLE_AGREEMENT)

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"on {self.tokens} tokens of {self.text}, logits differ by {self.mean_difference:.2g} "
            f"(at most {self.max_difference:.2g}), KL {self.kl:.2g} nats a token, the likeliest "
            f"token is the same at {self.top1_agreement:.1%}"
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows of tokens, and where they come from."""

    text: str
    rows: list[list[int]]


def draw_sample(vocab_size: int, count: int, data_file: str = "") -> Sample:
    """At most `count` tokens of the built-in text, or of documents drawn from a file.

    Raises:
        ConfigError, DataError: the file cannot be read, or has no place in the vocabulary.
    """
    if count <= 0:
        return Sample("", [])
    if not data_file:
        rows = [[int(number) for number in ids.split()] for ids in IDS]
        if vocab_size <= max(map(max, rows)):
            # the ids of single bytes, or of anything in a vocabulary without them
            rows = [[(byte + 1) % vocab_size for byte in text.encode()] for text in TEXTS]
        return Sample("a built-in text", [row[: max(1, count // len(rows))] for row in rows])
    documents = read_documents(DataConfig(data_file=data_file), Tokenizer(vocab_size))
    rows = []
    for i in np.random.default_rng(0).permutation(len(documents)):
        start, end = documents.starts[i], documents.starts[i + 1]
        wanted = min(end - start, LONGEST, count)
        rows.append(documents.tokens[start : start + wanted].tolist())
        count -= wanted
        if not count:
            break
    return Sample(data_file, rows)


@torch.no_grad()
def compare_models(adapted: RWKV, merged: RWKV, given: Sample) -> Comparison:
    """How far the answers of two models, mapped or not, are apart on a sample.

    The models run one after the other.
    """
    hidden = [_compute_hidden(model, given.rows).split(POSITIONS) for model in (adapted, merged)]
    largest, total, kl, same, count = 0.0, 0.0, 0.0, 0, 0
    for one, other in zip(*hidden, strict=True):
        # float64 of few positions at a time, as a vocabulary is large
        logits = zip(adapted.head(one).split(8), merged.head(other).split(8), strict=True)
        for wanted, found in logits:
            wanted, found = wanted.double(), found.double()
            difference = (wanted - found).abs_()
            largest = max(largest, difference.max().item())
            total += difference.mean().item() * len(wanted)
            same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
            wanted, found = wanted.log_softmax(-1), found.log_softmax(-1)
            kl += (wanted.exp() * (wanted - found)).sum().item()
            count += len(wanted)
    return Comparison(given.text, count, largest, total / count, kl / count, same / count)


# inference mode holds for one thread only, so it is set here and not by the caller; tensors that
# are made in it can be used in it alone
@torch.inference_mode()
def _compute_hidden(model: RWKV, rows: list[list[int]]) -> Tensor:
    """The last hidden states (positions, D) of all rows, concatenated."""
    model.eval()
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    is_given = torch.zeros_like(tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        is_given[i, : len(row)] = True
    return model.hidden(tokens)[0][is_given]
