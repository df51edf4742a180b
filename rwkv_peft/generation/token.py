"""One token's forward over tensors that stay where they are, on a GPU a graph of its kernels."""

import warnings
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.device import has_graphs
from rwkv_peft.models.base import RWKV
from rwkv_peft.state import RWKVState

# tokens that run before one is captured: what is compiled or tuned at a first call is then there
UNCAPTURED = 2


def is_shared(model: RWKV) -> bool:
    """Whether several processes have parts of a model (FSDP2), and gather blocks to work."""
    return hasattr(model, "unshard")


class TokenStep:
    """Reads tokens one by one: the state, and the logits of the next token, lie in its own memory.

    Attributes:
        is_used: whether to use it at all: where the device has graphs, and blocks are not gathered.
    """

    def __init__(self, model: RWKV) -> None:
        self._model, self._device = model, model.emb.weight.device
        self.is_used = has_graphs(self._device) and not is_shared(model)
        self._seen = 0
        self._graph: Any = None
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        self._state: RWKVState | None = None
        self._logits: Tensor | None = None

    def __call__(self, token: int, state: RWKVState) -> tuple[Tensor, RWKVState]:
        """The logits (V,) and the state after a token; both are overwritten by the next call.

        Args:
            state: of one row, before the token; what the last call gave need not be copied.
        """
        if self._state is None:
            self._state = RWKVState(*(x.clone() for x in state))
        elif state is not self._state:
            _copy(state, self._state)
        self._token.fill_(token)
        if self._graph is None and self._seen == UNCAPTURED and has_graphs(self._device):
            self._graph = self._capture()
        self._seen += 1
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        assert self._logits is not None
        return self._logits, self._state

    def _run(self) -> None:
        """The whole step: it reads the token and the state, and writes the logits and the state."""
        assert self._state is not None
        hidden, layers = self._model.hidden(self._token, self._state)
        logits = self._model.head(hidden[:, -1])[0]
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        self._logits.copy_(logits)
        # as the last of all, since layers read it
        _copy(RWKVState.from_layers(layers), self._state)

    def _capture(self) -> Any:
        """A graph of the step, which is not run; None if its kernels cannot be captured."""
        module = torch.get_device_module(self._device)
        graph = module.CUDAGraph()
        try:
            # other threads may use the device meanwhile
            with module.graph(graph, capture_error_mode="thread_local"):
                self._run()
        except RuntimeError as error:
            self.is_used = False
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"tokens are generated without a graph, slower: {reason}", stacklevel=2)
            return None
        return graph


def _copy(state: RWKVState, to: RWKVState) -> None:
    for x, own in zip(state, to, strict=True):
        own.copy_(x)
