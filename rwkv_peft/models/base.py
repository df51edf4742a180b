"""The skeleton of every version: embedding, blocks, last norm, head; state in, state out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.errors import ShapeError
from rwkv_peft.models.config import ModelConfig
from rwkv_peft.models.frozen import FrozenLinear
from rwkv_peft.models.layers import PackingInfo
from rwkv_peft.models.offload import HostStore
from rwkv_peft.models.recompute import recompute
from rwkv_peft.models.version import Version
from rwkv_peft.ops.dispatch import Choice
from rwkv_peft.ops.validation import require_segments
from rwkv_peft.state import LayerState, RWKVState


class RWKV(nn.Module):
    """An RWKV language model whose parameters are named as in the official files.

    Attributes:
        model_config: its shape.
        version: the record of its version.
        op: the chosen backend of its operator.
        grad_cp, host: recompute each block in backward; its input waits in `host` if there is one.
        compiled: takes a block and its arguments in training, see `compile.compile_blocks`.
        initial_state: of one row, where a text begins if none is given; a merged file may bring it.
    """

    def __init__(self, model_config: ModelConfig, version: Version, op: Choice) -> None:
        super().__init__()
        self.model_config, self.version = model_config, version
        self.op, self.grad_cp = op, False
        self.host: HostStore | None = None
        self.compiled: Callable[..., Any] | None = None
        self.initial_state: RWKVState | None = None
        # an embedding that draws its own weights on the meta device loads a compiler to do so
        self.emb = nn.Embedding.from_pretrained(
            torch.empty(model_config.vocab_size, model_config.n_embd), freeze=False
        )
        self.blocks = nn.ModuleList(
            version.block(model_config, layer, op.function) for layer in range(model_config.n_layer)
        )
        self.ln_out = nn.LayerNorm(model_config.n_embd)
        self.head = FrozenLinear(model_config.n_embd, model_config.vocab_size)

    @property
    def is_compiled(self) -> bool:
        """Whether blocks are compiled when they are trained."""
        return self.compiled is not None

    def forward(
        self,
        tokens: Tensor,
        state: RWKVState | None = None,
        *,
        segment_ids: Tensor | None = None,
    ) -> tuple[Tensor, RWKVState]:
        """Logits (B, T, V) of the token after each position, and the state after the last.

        Args:
            tokens: (B, T) integers below V, T >= 1.
            state: where to go on from; `initial_state` if None.
            segment_ids: (B, T) int32, numbers the documents packed into a row, never falling along
                it: state and token shift start anew where the number changes. The given state
                belongs to the first document of a row, the returned one to the last.
        Raises:
            ShapeError: tokens, state or segments have the wrong shape.
        """
        hidden, layers = self.hidden(tokens, state, segment_ids=segment_ids)
        return self.head(hidden), RWKVState.from_layers(layers)

    def hidden(
        self,
        tokens: Tensor,
        state: RWKVState | None = None,
        *,
        segment_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[LayerState]]:
        """Like `forward`, with the normed last hidden state (B, T, D) in place of logits.

        The state comes as a list of its layers, so that nothing is stacked if it is not used.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ShapeError(f"tokens must be (B, T) with T >= 1, got {tuple(tokens.shape)}")
        if state is None and self.initial_state is not None:
            state = self.initial_state.expand(len(tokens))
        if state is not None and state.wkv.shape[:2] != (len(self.blocks), len(tokens)):
            raise ShapeError(
                f"the state is of {tuple(state.wkv.shape[:2])} (layers, rows), "
                f"the model and tokens of {(len(self.blocks), len(tokens))}"
            )
        require_segments("the model", segment_ids, tokens)
        x, carry, packing = self.emb(tokens), None, PackingInfo.of(segment_ids)
        layers: list[Any] = [None] * len(self.blocks) if state is None else [*state.layers()]
        for i, block in enumerate(self.blocks):
            x, carry, layers[i] = self.run_block(block, x, carry, layers[i], packing)
        return self.ln_out(x), layers

    def run_block(self, block: nn.Module, x: Tensor, *others: Any) -> Any:
        """A block's results, in training compiled or with recomputing where that is asked for."""
        if not torch.is_grad_enabled():
            return block(x, *others)
        if self.compiled is not None:
            return self.compiled(block, x, *others)
        return recompute(block, x, *others, host=self.host) if self.grad_cp else block(x, *others)
