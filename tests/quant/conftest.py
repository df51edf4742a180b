import pytest

from rwkv_peft.training import choose_device


@pytest.fixture(autouse=True)
def fp8_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch multiplies FP8 on a CPU too, which nobody would train with."""
    monkeypatch.setattr(choose_device, "fp8_objection", lambda device: "")
