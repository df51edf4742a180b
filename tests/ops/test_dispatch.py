"""The choice of a backend."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from rwkv_peft.errors import BackendUnavailableError
from rwkv_peft.ops.cuda import availability
from rwkv_peft.ops.dispatch import Backend, Request, select

REQUEST = Request(torch.device("cpu"), torch.float32, 64)


def backend(name: str, objection: str | None = None) -> Backend:
    return Backend(name, lambda: lambda: name, lambda request: objection, f"note of {name}")


TABLE = (backend("cuda", "needs luck"), backend("triton"), backend("torch"))


def test_auto_takes_the_first_that_can_serve_and_tells_why_and_what_else_could() -> None:
    choice = select("wkv", TABLE, "auto", REQUEST)
    assert (choice.name, choice.function()) == ("triton", "triton")
    assert choice.reason == "note of triton; cuda needs luck"
    assert choice.others == ("torch",)


def test_a_name_takes_that_backend() -> None:
    choice = select("wkv", TABLE, "torch", REQUEST)
    assert (choice.name, choice.reason) == ("torch", "note of torch; asked for by name")
    assert choice.others == ("triton",)


@pytest.mark.parametrize(
    ("op", "table", "message"),
    [
        ("cuda", TABLE, "op='cuda' needs luck: use --op auto or --op triton or --op torch"),
        ("fla", TABLE, "op='fla' is not a backend of wkv: use auto, cuda, triton, torch"),
        ("auto", TABLE[:1], "wkv: no backend can serve: cuda needs luck"),
    ],
)
def test_what_cannot_be_had_is_told_with_what_can(
    op: str, table: tuple[Backend, ...], message: str
) -> None:
    with pytest.raises(BackendUnavailableError) as raised:
        select("wkv", table, op, REQUEST)
    assert str(raised.value) == message


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets PyTorch and the driver seem to have found a GPU of NVIDIA."""

    def pretend(capability: tuple[int, int] = (9, 0), hip: str | None = None) -> None:
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(availability, "driver", SimpleNamespace(driver=lambda: None))

    pretend()
    return pretend


def test_cuda_kernels_serve_gpus_of_nvidia_from_ampere_on(nvidia: Callable[..., None]) -> None:
    def objection(device: str = "cuda", head_size: int = 64, **given: object) -> str | None:
        dtype = given.get("dtype", torch.bfloat16)
        assert isinstance(dtype, torch.dtype)
        return availability.objection(Request(torch.device(device), dtype, head_size))

    assert objection() is None
    assert objection("cpu") == objection("xpu") == "needs an NVIDIA GPU"
    assert objection(head_size=32) == "needs head size 64, got 32"
    assert objection(dtype=torch.float64) == "has no kernels for float64"
    nvidia(capability=(7, 5))
    assert objection() == "needs compute capability 8.0, and this GPU has 7.5"
    nvidia(hip="6.4")
    assert objection() == "needs an NVIDIA GPU"


def test_cuda_kernels_without_a_driver_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability.driver, "LIBRARY", "libnowhere.so.1")
    availability.driver.driver.cache_clear()
    said = availability.objection(Request(torch.device("cuda"), torch.bfloat16, 64))
    assert said is not None and said.startswith("cannot start: NVIDIA's driver is not found")
