"""How well a model foretells the texts of files: per file, and per role in dialogues."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkv_peft.config import DataConfig
from rwkv_peft.data.documents import Documents
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.sources import TOKEN_TYPES
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import DataError
from rwkv_peft.loss import MAX_LOGITS
from rwkv_peft.models.base import RWKV
from rwkv_peft.state import RWKVState

# documents, and tokens of each, that go through a model at once
NUM_ROWS, WINDOW = 8, 1024
# roles that data usually has; a role of another name counts in the whole alone
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class TextScore:
    """Sums over some of the tokens of texts.

    Attributes:
        cross_entropy: in nats.
        num_tokens: tokens that are foretold; never the first of a document.
        num_bytes: of their text; 0 if it is not known.
    """

    cross_entropy: float
    num_tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a token in nats."""
        return self.cross_entropy / max(1, self.num_tokens)

    @property
    def perplexity(self) -> float | None:
        """Of a token; None where no float is as large."""
        return math.exp(self.loss) if self.loss < 700 else None

    @property
    def bits_per_byte(self) -> float | None:
        """Cross-entropy in bits for each byte; None without bytes."""
        return self.cross_entropy / math.log(2) / self.num_bytes if self.num_bytes else None


@dataclass(frozen=True, slots=True)
class TextScores:
    """What an evaluation of texts found.

    Attributes:
        total: over what the loss mask chooses.
        files: the same for each file.
        roles: for each role that the texts have, over its words; {} for texts without roles.
    """

    total: TextScore
    files: dict[str, TextScore]
    roles: dict[str, TextScore]


def score_texts(
    model: RWKV, config: DataConfig, progress: Callable[[int], None] = lambda done: None
) -> TextScores:
    """Scores the texts that `config` names, over what its loss mask chooses.

    Each text goes through the model once, whatever the files and roles.

    Args:
        progress: called with the number of tokens that were read since the last call.
    Raises:
        ConfigError: a file, the template or the mask does not exist.
        DataError: a row is broken, or there is nothing to evaluate.
    """
    tokenizer = Tokenizer(model.model_config.vocab_size)
    config = replace(config, max_untrained=1.0)
    chosen = read_documents(config, tokenizer)
    # all that any mask may choose
    whole = read_documents(replace(config, loss_mask="none"), tokenizer)
    losses = find_losses(model, whole, progress)
    sizes = None if tokenizer.is_foreign else tokenizer.token_sizes
    sums = _Sums(whole, losses, sizes)
    files = {
        path: sums.score(chosen, source)
        for source, path in enumerate(chosen.paths)
        if (chosen.sources == source).any()
    }
    roles = {}
    has_roles = not set(whole.report.forms) <= {"text", "tokens", *TOKEN_TYPES}
    for role in ROLES if has_roles or chosen.weights is not None else ():
        try:
            found = read_documents(replace(config, loss_mask=f"roles={role}"), tokenizer)
        except DataError:
            # nobody has this role
            continue
        roles[role] = sums.score(found)
    return TextScores(sums.score(chosen), files, roles)


class _Sums:
    """Sums of losses over the tokens that other readings of the same data choose."""

    def __init__(
        self,
        whole: Documents,
        losses: NDArray[np.float32],
        token_sizes: NDArray[np.int64] | None,
    ) -> None:
        self._losses, self._token_sizes = losses, token_sizes
        # a row of a file may be left out by a mask, so that documents are known by their places
        places = zip(whole.sources.tolist(), whole.lines.tolist(), strict=True)
        self._starts = dict(zip(places, whole.starts[:-1].tolist(), strict=True))

    def score(self, documents: Documents, source: int | None = None) -> TextScore:
        """Over the tokens with a loss weight, of all files or of one."""
        nats, num_tokens, num_bytes = 0.0, 0, 0
        for i in range(len(documents)):
            own = int(documents.sources[i])
            if source is not None and own != source:
                continue
            first, end = documents.starts[i] + 1, documents.starts[i + 1]
            at = self._starts[own, int(documents.lines[i])] + 1
            is_chosen = np.ones(end - first, dtype=bool)
            if documents.weights is not None:
                is_chosen = documents.weights[first:end] != 0
            nats += float(self._losses[at : at + end - first][is_chosen].sum(dtype=np.float64))
            num_tokens += int(is_chosen.sum())
            if self._token_sizes is not None:
                tokens = documents.tokens[first:end][is_chosen]
                num_bytes += int(self._token_sizes[tokens].sum())
        return TextScore(nats, num_tokens, num_bytes)


@torch.inference_mode()
def find_losses(
    model: RWKV, documents: Documents, progress: Callable[[int], None] = lambda done: None
) -> NDArray[np.float32]:
    """Cross-entropy in nats of each token of documents, (tokens,); 0 for the first of each."""
    losses = np.zeros(len(documents.tokens), dtype=np.float32)
    # those of like lengths together, so that little is padding
    order = np.argsort(np.diff(documents.starts), kind="stable")
    for start in range(0, len(order), NUM_ROWS):
        rows = order[start : start + NUM_ROWS]
        tokens = [documents.tokens[documents.starts[i] : documents.starts[i + 1]] for i in rows]
        found = torch.cat(list(_losses_of_rows(model, tokens)), 1) if tokens else None
        for row, i in enumerate(rows):
            size = int(documents.starts[i + 1] - documents.starts[i])
            if found is not None:
                first = int(documents.starts[i]) + 1
                losses[first : first + size - 1] = found[row, : size - 1].numpy()
            progress(size)
    return losses


def _losses_of_rows(model: RWKV, rows: list[NDArray[np.integer]]) -> Iterator[Tensor]:
    """(B, T) of the tokens behind the first, window by window, filled up with any numbers."""
    width = max(2, *map(len, rows)) if len(rows) > 1 else max(2, len(rows[0]))
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
    state: RWKVState | None = None
    for start in range(0, width - 1, WINDOW):
        end = min(start + WINDOW, width - 1)
        device = model.emb.weight.device
        hidden, layers = model.hidden(tokens[:, start:end].to(device), state)
        state = RWKVState.from_layers(layers)
        targets = tokens[:, start + 1 : end + 1].to(device)
        losses = losses_of_hidden(model, hidden.flatten(0, 1), targets.flatten())
        yield losses.view_as(targets).cpu()


def losses_of_hidden(model: RWKV, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (R,) in nats, float32, of tokens (R,) after hidden states (R, D)."""
    size = max(1, MAX_LOGITS // model.model_config.vocab_size)
    parts = []
    for rows, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = model.head(rows).float()
        parts.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(parts)
