import pytest

from rwkv_peft.training import choose


@pytest.fixture(autouse=True)
def fp8_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch multiplies FP8 on a CPU too, which nobody would train with."""
    monkeypatch.setattr(choose, "fp8_objection", lambda device: "")
