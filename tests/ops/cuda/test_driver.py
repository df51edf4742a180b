"""Loading and launching, against a library that stands in for NVIDIA's driver."""

import contextlib
import ctypes
import functools
import shutil
import subprocess
import threading
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_peft.errors import BackendUnavailableError
from rwkv_peft.ops.cuda import cache, driver

SIGNATURE = "PiPfqi"
STREAM = 0x7FFF_0000_1234_5678
POINTER, OTHER, FAR = 0x7F12_3456_789A_BC00, 0x7F12_3456_789A_BD00, -(1 << 40)


class Params(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("y", ctypes.c_void_p),
        ("by", ctypes.c_float),
        ("far", ctypes.c_longlong),
        ("last", ctypes.c_int),
    ]


class Record(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_uint64) for n in ("function", "stream", "size")),
        ("grid", ctypes.c_uint64 * 3),
        ("block", ctypes.c_uint64 * 3),
        *((n, ctypes.c_uint64) for n in ("shared", "launches", "shared_asked", "modules", "mixed")),
        ("attributes", ctypes.c_uint64),
        ("marks_valid", ctypes.c_int64),
        ("params", Params),
        ("code", ctypes.c_char * 16),
    ]


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to build the stand-in for the driver")
    library = tmp_path_factory.mktemp("fake") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_libcuda.cpp")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@pytest.fixture
def fake(
    fake_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ctypes.CDLL]:
    copy = shutil.copy(fake_library, tmp_path)
    cached = (driver.driver, driver.load_kernel, driver._load_module)

    def forget() -> None:
        for function in cached:
            function.cache_clear()

    monkeypatch.setattr(driver, "LIBRARY", str(copy))
    monkeypatch.setattr(cache, "cache_folder", tmp_path.joinpath)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: STREAM + i, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    forget()
    library = ctypes.CDLL(str(copy))
    library.fake_record.restype = ctypes.POINTER(Record)
    yield library
    forget()


@pytest.fixture
def load(tmp_path: Path, fake: ctypes.CDLL) -> Any:
    (tmp_path / "scale.cu").write_text(
        'extern "C" __global__ void scale(float* x, int n, float* y, float by, long long far, '
        "int last) { x[far] = n * by + last + y[0]; }"
    )
    files = (tmp_path / "scale.cu",)
    return functools.partial(
        driver.load_kernel, files, "scale", device_index=0, signature=SIGNATURE
    )


def test_a_launch_gives_the_driver_every_argument_where_a_c_compiler_puts_it(
    fake: ctypes.CDLL, load: Any
) -> None:
    load()((3, 4, 5), 128, 0.5, FAR, 1 << 30)(POINTER, -7, OTHER)
    record = fake.fake_record().contents
    assert record.marks_valid and record.size == fake.fake_params_size()
    values = [getattr(record.params, name) for name, _ in Params._fields_]
    assert values == [POINTER, -7, OTHER, 0.5, FAR, 1 << 30]
    assert (record.function, record.stream) == (0x7000000000000DEF, STREAM)
    assert (list(record.grid), list(record.block)) == ([3, 4, 5], [128, 1, 1])
    assert record.attributes == 0
    assert record.code[:4] == b"\x7fELF"


def test_no_pointer_is_zero(fake: ctypes.CDLL, load: Any) -> None:
    load()((1, 1, 1), 32, 1.0, 2, 3)(0, 1, OTHER)
    assert fake.fake_record().contents.params.x is None


def test_a_kernel_is_loaded_once_a_process_and_a_module_once_for_its_kernels(
    fake: ctypes.CDLL, load: Any
) -> None:
    assert load() is load()
    assert load(shared_bytes=100) is not load()
    assert fake.fake_record().contents.modules == 1


def test_more_shared_memory_than_a_block_has_by_itself_is_asked_for(
    fake: ctypes.CDLL, load: Any
) -> None:
    load(shared_bytes=1000)((1, 1, 1), 32, 0, 0, 0)(0, 0, 0)
    record = fake.fake_record().contents
    assert (record.shared, record.shared_asked) == (1000, 0)
    load(shared_bytes=200_000)((1, 1, 1), 32, 0, 0, 0)(0, 0, 0)
    assert (record.shared, record.shared_asked) == (200_000, 200_000)


def test_errors_of_the_driver_have_its_names(fake: ctypes.CDLL, load: Any) -> None:
    with pytest.raises(BackendUnavailableError, match=r"300000 bytes.*CUDA_ERROR_INVALID_VALUE"):
        load(shared_bytes=300_000)
    fake.fake_fail_next_launch(1)
    with pytest.raises(
        BackendUnavailableError,
        match=r"kernel scale was not started: CUDA_ERROR_INVALID_VALUE \(invalid argument\) \(grid",
    ):
        load()((1, 1, 1), 9999, 0, 0, 0)(0, 0, 0)
    fake.fake_fail_next_launch(77)
    with pytest.raises(BackendUnavailableError, match="error 77"):
        load()((1, 1, 1), 32, 0, 0, 0)(0, 0, 0)
    files = load.args[0]
    with pytest.raises(BackendUnavailableError, match=r"kernel other of scale.cu: CUDA_ERROR_NOT_"):
        driver.load_kernel(files, "other", device_index=0, signature="")


def test_the_drivers_version_is_read(fake: ctypes.CDLL) -> None:
    assert driver.version() == (12, 8)


def test_no_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libnowhere.so.1")
    with pytest.raises(BackendUnavailableError, match=r"driver is not found: libnowhere"):
        driver.driver.__wrapped__()


def test_a_thread_in_which_nothing_has_used_the_gpu_can_launch(
    fake: ctypes.CDLL, load: Any
) -> None:
    launch = load()((1, 1, 1), 32, 1.0, 2, 3)
    thread = threading.Thread(target=launch, args=(POINTER, 1, 0))
    thread.start()
    thread.join()
    record = fake.fake_record().contents
    assert (record.launches, record.params.x) == (1, POINTER)


def test_a_kernel_of_another_gpu_than_the_current_is_launched_there(
    fake: ctypes.CDLL, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = [0]

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0])
    load(device_index=1)((1, 1, 1), 32, 0, 0, 0)(0, 0, 0)
    assert fake.fake_record().contents.stream == STREAM + 1
    assert current == [0]


def test_threads_that_launch_at_once_do_not_mix_their_arguments(
    fake: ctypes.CDLL, load: Any
) -> None:
    kernel = load()
    # the driver reads the first parameter before its pause and the others after
    fake.fake_pause(20)

    def launch_often(number: int) -> None:
        launch = kernel((1, 1, 1), 32, 1.0, 2, 3)
        for _ in range(200):
            launch(number, 0, number)

    threads = [threading.Thread(target=launch_often, args=(n,)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = fake.fake_record().contents
    assert (record.launches, record.mixed) == (600, 0)


def test_a_launch_of_sixteen_arguments_costs_the_host_under_five_microseconds(
    fake: ctypes.CDLL, load: Any
) -> None:
    launch = load(signature="P" * 12 + "iiif")((8, 32, 1), 128, 1, 2, 3, 1.0)
    addresses = range(POINTER, POINTER + 12 * 512, 512)
    times = timeit.repeat(lambda: launch(*addresses), number=200, repeat=50)
    assert min(times) / 200 < 5e-6


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 0), "sm_120")]
)
def test_hopper_gets_what_no_other_generation_has(
    capability: tuple[int, int], arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert driver.architecture(0) == arch
