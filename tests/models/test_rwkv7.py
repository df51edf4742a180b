from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rwkv_peft
from rwkv_peft.errors import ShapeError
from rwkv_peft.models.base import RWKV

TOLERANCE = 1e-4  # absolute, on logits of a few units
MODEL_CONFIGS = {
    "two layers": {},
    "block 0 with an unused value mix": {"has_first_value_mix": True},
    "one layer": {"n_layer": 1},
    "uneven ranks": {"ranks": {"w": 64, "a": 32, "v": 16, "g": 96}, "n_layer": 3},
    "wide": {"n_embd": 256, "dim_att": 256, "dim_ffn": 896, "vocab_size": 1000},
}


def random_tokens(num: int, vocab_size: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (1, num), generator=generator)


def by_stretches(model: RWKV, tokens: torch.Tensor, *lengths: int) -> torch.Tensor:
    state, logits = None, []
    for stretch in tokens.split(lengths, 1):
        part, state = model(stretch, state)
        logits.append(part)
    return torch.cat(logits, 1)[0]


@pytest.mark.parametrize("name", MODEL_CONFIGS)
@torch.inference_mode()
def test_logits_equal_those_of_the_official_runtime(
    name: str, make_model_file: Callable[..., Path], official_logits: Callable[..., torch.Tensor]
) -> None:
    path = make_model_file(**MODEL_CONFIGS[name])
    model = rwkv_peft.load_model(path)
    tokens = random_tokens(48, model.model_config.vocab_size)
    official = official_logits(path, tokens[0].tolist())
    assert official.abs().max() > 0.5
    for ours in (
        model(tokens)[0][0],
        by_stretches(model, tokens, 5, 33, 10),
        by_stretches(model, tokens, *[1] * 48),
    ):
        torch.testing.assert_close(ours, official, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("op", ["torch", "reference"])
def test_every_backend_gives_the_same_logits(op: str, model_file: Path) -> None:
    tokens = random_tokens(40, 320)
    expected = rwkv_peft.load_model(model_file, dtype="float64", op="reference")(tokens)[0]
    ours = rwkv_peft.load_model(model_file, dtype="float64", op=op)(tokens)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_tokens_padded_on_the_right_do_not_change_the_logits_before(model_file: Path) -> None:
    model = rwkv_peft.load_model(model_file, dtype="float64")
    tokens = random_tokens(37, 320)
    padded = torch.nn.functional.pad(tokens, (0, 11))
    torch.testing.assert_close(model(padded)[0][:, :37], model(tokens)[0], rtol=0, atol=1e-10)


def test_rows_of_a_batch_give_what_they_give_alone(model_file: Path) -> None:
    model = rwkv_peft.load_model(model_file, dtype="float64")
    tokens = random_tokens(60, 320).view(3, 20)
    together = model(tokens)[0]
    for row in range(3):
        alone = model(tokens[row : row + 1])[0]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-10)


def test_gradient_reaches_the_initial_state_across_two_chunks(model_file: Path) -> None:
    model = rwkv_peft.load_model(model_file, dtype="float64")
    tokens = random_tokens(40, 320)
    _, state = model(tokens[:, :20])
    leaf = state.wkv.detach().requires_grad_()
    carried = type(state)(state.att_shift.detach(), state.ffn_shift.detach(), leaf)
    logits, _ = model(tokens[:, 20:], carried)
    (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
    step = 1e-6 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0)).double()
    ends = []
    for sign in (1, -1):
        moved = type(state)(carried.att_shift, carried.ffn_shift, leaf.detach() + sign * step)
        ends.append(model(tokens[:, 20:], moved)[0].square().sum())
    torch.testing.assert_close((gradient * step).sum(), (ends[0] - ends[1]) / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype: torch.dtype, model_file: Path) -> None:
    tokens = random_tokens(40, 320)
    exact = rwkv_peft.load_model(model_file)(tokens)[0]
    half, state = rwkv_peft.load_model(model_file, dtype=dtype)(tokens)
    assert half.dtype == dtype
    assert state.wkv.dtype == torch.float32
    # bf16 keeps 8 bits; a dozen roundings in a row leave about 2 % of the largest logit
    assert (half.float() - exact).abs().max() < 0.04 * exact.abs().max()


def test_a_state_of_another_model_is_refused(make_model_file: Callable[..., Path]) -> None:
    one = rwkv_peft.load_model(make_model_file("one.pth"))
    other = rwkv_peft.load_model(make_model_file("other.pth", n_layer=1))
    _, state = other(torch.tensor([[1, 2]]))
    with pytest.raises(ShapeError, match=r"state is of .*\(1, 1\).*\(2, 1\)"):
        one(torch.tensor([[1, 2]]), state)
    with pytest.raises(ShapeError, match=r"tokens must be \(B, T\)"):
        one(torch.tensor([1, 2]))
