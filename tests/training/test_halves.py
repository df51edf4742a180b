import torch

from rwkv_peft.training.halves import join, split


def floats_of_all_kinds() -> torch.Tensor:
    """Each sign and exponent with fractions around those where bf16 rounds, and random bits."""
    ends = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    fractions = (torch.tensor([0, 1, 2, 0x40, 0x7E, 0x7F])[:, None] * 0x10000 + ends).flatten()
    bits = ((torch.arange(512) - 256)[:, None] * 0x800000 + fractions).flatten()
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (1_000_000,), generator=generator)
    return torch.cat((bits, random)).to(torch.int32).view(torch.float32)


def test_the_halves_of_every_kind_of_float32_join_bit_for_bit() -> None:
    values = floats_of_all_kinds()
    values = values[~values.isnan()]
    kinds = (values == 0, values.isinf(), (values.abs() < 2**-126) & (values != 0), values < 0)
    assert all(kind.any() for kind in kinds) and torch.finfo(torch.float32).max in values
    high, low = torch.empty_like(values).bfloat16(), torch.empty_like(values).to(torch.int16)
    split(values.clone(), high, low)
    assert torch.equal(join(high, low).view(torch.int32), values.view(torch.int32))
    # nearest: as near as that of PyTorch, which takes the even one of two
    error, least = ((x.double() - values.double()).abs() for x in (high, values.bfloat16()))
    is_finite = high.isfinite()
    assert torch.equal(error[is_finite], least[is_finite])
    assert torch.equal(is_finite, values.bfloat16().isfinite())
