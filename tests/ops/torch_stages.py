"""The six stages of WKV-7 in PyTorch: the formulas of `rwkv_peft.ops.wkv7.stages`, on any device.

The tests hold them against the reference, and with them the operator that is made of stages.
Documents mask the products: `enters` marks the tokens of the document of S_0, `leaves` those of the
document of S_1.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_peft.ops.wkv7.reference import DECAY_SCALE
from rwkv_peft.ops.wkv7.stages import Stages


class _Decays(NamedTuple):
    """Of all chunks: (B, H, M, C, N), or one row in place of C."""

    to_token: Tensor  # e^{g_t-m}
    before: Tensor  # e^{g_{t-1}-m}
    from_token: Tensor  # e^{m-g_t}
    middle: Tensor  # e^m
    rest: Tensor  # e^{G-m}
    whole: Tensor  # e^G
    dlog_dw: Tensor


class _Documents(NamedTuple):
    """Masks of 0 and 1 over (B, 1, M, ...)."""

    strict: Tensor  # (..., C, C): i < t in one document
    causal: Tensor  # i <= t
    enters: Tensor  # (..., C, 1)
    leaves: Tensor
    carried: Tensor  # (..., 1, 1)


def torch_stages(
    chunk: int = 64,
    rounding: torch.dtype | None = None,
    inverse_rounding: torch.dtype | None = None,
) -> Stages:
    """The stages as plain matrix products, for chunks of any even length.

    Args:
        rounding: type to which the operands of every product are rounded, as matrix units do; sums
            are in float32, or float64 beside float64 inputs.
        inverse_rounding: likewise for the products that merge the blocks of the inverse.
    """
    formulas = _Formulas(chunk, rounding, inverse_rounding)
    return Stages(
        lambda dtype, device: chunk,
        formulas.chunk_forward,
        formulas.state_forward,
        formulas.output,
        formulas.chunk_backward,
        formulas.state_backward,
        formulas.gradients,
    )


@dataclass(frozen=True)
class _Formulas:
    chunk: int
    rounding: torch.dtype | None
    inverse_rounding: torch.dtype | None

    def chunk_forward(  # type: ignore[no-untyped-def]
        self, r, w, k, v, a, b, segment_ids, y, transition, added, decay, readout, inverse
    ) -> None:
        e, documents = self._decays(w), self._documents(segment_ids, r)
        at, bt = self._cut(a) * e.before, self._cut(b) * e.from_token
        rt, kt, v = self._cut(r) * e.to_token, self._cut(k) * e.from_token, self._cut(v)
        L = self._inverse(self._product(at, bt.mT) * documents.strict)
        A_ak = self._product(at, kt.mT) * documents.strict
        A_rk = self._product(rt, kt.mT) * documents.causal
        A_rb = self._product(rt, bt.mT) * documents.causal
        u = self._product(L, self._product(A_ak, v))
        x, R = self._state_maps(e, documents, L, A_rb, rt, at, bt)
        kept = self._product(v.mT, kt * documents.leaves)
        kept += self._product(u.mT, bt * documents.leaves)
        y.copy_(self._join(self._product(A_rk, v) + self._product(A_rb, u), y))
        transition.copy_(x)
        added.copy_(kept * e.rest)
        decay.copy_((e.whole * documents.carried)[..., 0, :])
        readout.copy_(R)
        if inverse is not None:
            inverse.copy_(L)

    def state_forward(  # type: ignore[no-untyped-def]
        self, transition, added, decay, initial_state, states, last_state
    ) -> None:
        state = torch.zeros_like(last_state) if initial_state is None else initial_state
        for m in range(states.shape[2]):
            states[:, :, m] = state
            state = self._advance(state, transition[:, :, m], added[:, :, m], decay[:, :, m])
        last_state.copy_(state)

    def output(  # type: ignore[no-untyped-def]
        self, readout, states, y
    ) -> None:
        y += self._join(self._product(readout, states.mT), y)

    def chunk_backward(  # type: ignore[no-untyped-def]
        self, r, w, a, b, segment_ids, inverse, dy, transition, added, decay
    ) -> None:
        e, documents = self._decays(w), self._documents(segment_ids, r)
        rt, at, bt = (
            self._cut(x) * f for x, f in ((r, e.to_token), (a, e.before), (b, e.from_token))
        )
        A_rb = self._product(rt, bt.mT) * documents.causal
        x, R = self._state_maps(e, documents, inverse, A_rb, rt, at, bt)
        transition.copy_(x)
        added.copy_(self._product(self._cut(dy).mT, R))
        decay.copy_((e.whole * documents.carried)[..., 0, :])

    def state_backward(  # type: ignore[no-untyped-def]
        self, transition, added, decay, dlast_state, dstates, dinitial_state
    ) -> None:
        d = torch.zeros_like(dinitial_state) if dlast_state is None else dlast_state
        for m in reversed(range(dstates.shape[2])):
            dstates[:, :, m] = d
            d = self._advance(d, transition[:, :, m].mT, added[:, :, m], decay[:, :, m])
        dinitial_state.copy_(d)

    def gradients(  # type: ignore[no-untyped-def]
        self,
        r,
        w,
        k,
        v,
        a,
        b,
        segment_ids,
        inverse,
        states,
        last_state,
        dstates,
        dy,
        dr,
        dw,
        dk,
        dv,
        da,
        db,
    ) -> None:
        e, documents = self._decays(w), self._documents(segment_ids, r)
        strict, causal, enters, leaves, carried = documents
        at, bt = self._cut(a) * e.before, self._cut(b) * e.from_token
        rt, kt = self._cut(r) * e.to_token, self._cut(k) * e.from_token
        v, dy = self._cut(v), self._cut(dy)
        S, D = states * e.middle, dstates * e.rest
        product = self._product

        A_ak = product(at, kt.mT) * strict
        u = product(inverse, product(at * enters, S.mT) + product(A_ak, v))
        A_rb, A_rk = product(rt, bt.mT) * causal, product(rt, kt.mT) * causal
        z = product(inverse.mT, product(A_rb.mT, dy) + product(bt * leaves, D.mT))
        grad_v = product(A_rk.mT, dy) + product(A_ak.mT, z) + product(kt * leaves, D.mT)

        dA_rk, dA_rb = product(dy, v.mT) * causal, product(dy, u.mT) * causal
        dA_ak, dA_ab = product(z, v.mT) * strict, product(z, u.mT) * strict
        drt = enters * product(dy, S) + product(dA_rk, kt) + product(dA_rb, bt)
        dat = enters * product(z, S) + product(dA_ak, kt) + product(dA_ab, bt)
        dkt = product(dA_rk.mT, rt) + product(dA_ak.mT, at)
        dbt = product(dA_rb.mT, rt) + product(dA_ab.mT, at)
        dkt_leaving, dbt_leaving = leaves * product(v, D), leaves * product(u, D)

        # the decay of token t is in all that passes it: from tokens before to tokens after
        passed = rt * drt - kt * dkt - bt * dbt
        kept = kt * dkt_leaving + bt * dbt_leaving
        dlog = _from(passed) + _after(at * dat) + _before(kept)
        dlog += carried * (D * S).sum(-2, keepdim=True)

        dkt, dbt = dkt + dkt_leaving, dbt + dbt_leaving
        grads = {dr: drt * e.to_token, dw: dlog * e.dlog_dw, dk: dkt * e.from_token, dv: grad_v}
        grads.update({da: dat * e.before, db: dbt * e.from_token})
        for out, value in grads.items():
            out.copy_(self._join(value, out))

    def _state_maps(
        self,
        e: _Decays,
        documents: _Documents,
        L: Tensor,
        A_rb: Tensor,
        rt: Tensor,
        at: Tensor,
        bt: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What a chunk does to the state that enters it: transition and readout."""
        W = self._product(L, at * documents.enters)
        R = (rt * documents.enters + self._product(A_rb, W)) * e.middle
        X = self._product(W.mT, bt * documents.leaves) * e.middle.mT * e.rest
        return X, R

    def _advance(self, state: Tensor, transition: Tensor, added: Tensor, decay: Tensor) -> Tensor:
        return state * decay.unsqueeze(-2) + self._product(state, transition) + added

    def _rounded(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide) if dtype is None else x.to(dtype).to(wide)

    def _product(self, x: Tensor, y: Tensor) -> Tensor:
        return self._rounded(x, self.rounding) @ self._rounded(y, self.rounding)

    def _inverse(self, strict: Tensor) -> Tensor:
        """(I - strict)^-1, by substitution in blocks of 16 tokens, which products merge."""
        C = strict.shape[-1]
        eye = torch.eye(C, dtype=strict.dtype, device=strict.device)
        if C <= 16:
            solved: Tensor = torch.linalg.solve_triangular(
                eye - strict, eye, upper=False, unitriangular=True
            )
            return solved
        h, dtype = C // 2, self.inverse_rounding
        first, second = self._inverse(strict[..., :h, :h]), self._inverse(strict[..., h:, h:])
        inverse = torch.zeros_like(strict)
        inverse[..., :h, :h], inverse[..., h:, h:] = first, second
        left = self._rounded(second, dtype) @ self._rounded(strict[..., h:, :h], dtype)
        inverse[..., h:, :h] = self._rounded(left, dtype) @ self._rounded(first, dtype)
        return inverse

    def _cut(self, x: Tensor) -> Tensor:
        """(B, T, H, N) as (B, H, M, C, N), padded by zeros, in the computing type."""
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % self.chunk)).unflatten(1, (-1, self.chunk))
        return x.permute(0, 3, 1, 2, 4).to(torch.promote_types(x.dtype, torch.float32))

    def _join(self, x: Tensor, like: Tensor) -> Tensor:
        """(B, H, M, C, N) as (B, T, H, N)."""
        B, T, H, N = like.shape
        return x.permute(0, 2, 3, 1, 4).reshape(B, -1, H, N)[:, :T].to(like.dtype)

    def _decays(self, w: Tensor) -> _Decays:
        gate = torch.sigmoid(w.to(torch.promote_types(w.dtype, torch.float32)))
        log_decay = self._cut(gate * -DECAY_SCALE)
        g = log_decay.cumsum(-2)
        m, last = g[..., self.chunk // 2 - 1, None, :], g[..., -1:, :]
        return _Decays(
            to_token=(g - m).exp(),
            before=(g - log_decay - m).exp(),
            from_token=(m - g).exp(),
            middle=m.exp(),
            rest=(last - m).exp(),
            whole=last.exp(),
            dlog_dw=self._cut(gate * (1 - gate) * -DECAY_SCALE),
        )

    def _documents(self, segment_ids: Tensor | None, like: Tensor) -> _Documents:
        B, T = like.shape[:2]
        if segment_ids is None:
            segment_ids = torch.zeros(B, T, dtype=torch.int32, device=like.device)
        # padding tokens are of the last document
        ids = torch.cat((segment_ids, segment_ids[:, -1:].expand(-1, -T % self.chunk)), 1)
        ids = ids.view(B, 1, -1, self.chunk, 1)
        last = ids[..., -1:, :]
        before = torch.cat((ids[:, :, :1, :1], last[:, :, :-1]), 2)
        same = ids == ids.mT
        found = (same.tril(-1), same.tril(), ids == before, ids == last, last == before)
        wide = torch.promote_types(like.dtype, torch.float32)
        return _Documents(*(mask.to(wide) for mask in found))


def _from(x: Tensor) -> Tensor:
    """Along the tokens, the sum of each and what comes after."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _after(x: Tensor) -> Tensor:
    return _from(x) - x


def _before(x: Tensor) -> Tensor:
    return x.cumsum(-2) - x
