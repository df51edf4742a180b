"""Compiling without a GPU: real NVRTC, from its wheel."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rwkv_peft.errors import BackendUnavailableError
from rwkv_peft.ops.cuda import build, cache, nvrtc

SOURCE = """
#include "scale.cuh"
extern "C" __global__ void scale(float* x, int n, float by) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = scaled(x[i], by) + C;
}
"""
HEADER = "constexpr float scaled(float x, float by) { return x * by; }\n"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "cache_folder", tmp_path.joinpath)
    return tmp_path / "kernels"


@pytest.fixture
def kernel_file(tmp_path: Path) -> Path:
    (tmp_path / "scale.cuh").write_text(HEADER)
    (tmp_path / "scale.cu").write_text(SOURCE)
    return tmp_path / "scale.cu"


def arch_in_elf(cubin: bytes) -> int:
    """The architecture that a cubin's ELF header names, in its newer or older layout."""
    assert cubin[:4] == b"\x7fELF"
    flags = int.from_bytes(cubin[48:52], "little")
    return flags >> 8 & 0xFF if cubin[8] >= 8 else flags & 0xFF


# sm_80's code runs on all; sm_90a alone has kernels of its own
OTHERS = [pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_89", "sm_90")]


@pytest.mark.parametrize("arch", ["sm_80", *OTHERS, "sm_90a"])
def test_every_kernel_of_the_package_compiles(arch: str) -> None:
    files = set(Path(build.__file__).parents[1].rglob("*.cu"))
    declared = {file for builds in build.declared_builds() for file in builds[0]}
    assert files == declared, "a .cu file is in no BUILDS"
    assert build.compile_all(arch) == len(list(build.declared_builds()))


def test_the_matrix_units_of_hopper_are_not_waited_for_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logs, compile = [], nvrtc.compile

    def noting(source: str, **given: Any) -> tuple[bytes, str]:
        code, log = compile(source, **given)
        logs.append(log)
        return code, log

    monkeypatch.setattr(nvrtc, "compile", noting)
    for files, options in build.declared_builds():
        if "-DC=64" in options:
            build.build(files, arch="sm_90a", options=(*options, "--ptxas-options=-v"))
    # the compiler does so where registers are too few, which it says beside their number
    assert logs and all("registers" in log and "serialized" not in log for log in logs), logs


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_a_source_with_a_header_becomes_machine_code(arch: int, kernel_file: Path) -> None:
    cubin = build.build([kernel_file], arch=f"sm_{arch}", options=["-DC=64"])
    assert arch_in_elf(cubin) == arch
    assert b"scale\0" in cubin


def test_a_gpu_newer_than_the_compiler_gets_code_that_the_driver_finishes() -> None:
    source = 'extern "C" __global__ void f() {}'
    newest = nvrtc.supported_archs()[-1]
    ptx, _ = nvrtc.compile(source, arch="sm_990")
    assert re.search(rf"\.target sm_{newest}\b", ptx.decode())
    assert ptx.endswith(b"\0")


def test_a_gpu_older_than_the_compiler_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match=r"no machine code for sm_30, its oldest is"):
        nvrtc.compile("", arch="sm_30")


@pytest.mark.parametrize(
    ("arch", "target"),
    [
        ("sm_86", ("sm_86", False)),
        ("sm_87", ("sm_86", False)),
        ("sm_90a", ("sm_90a", False)),
        ("sm_100", ("compute_90", True)),
    ],
)
def test_a_gpu_the_compiler_lacks_takes_the_nearest_that_runs_on_it(
    arch: str, target: tuple[str, bool]
) -> None:
    assert nvrtc._target(arch, (75, 80, 86, 90)) == target


def test_an_error_in_a_source_is_told_with_file_line_and_log(kernel_file: Path) -> None:
    kernel_file.write_text('extern "C" __global__ void f() {\n  nothing();\n}')
    with pytest.raises(BackendUnavailableError) as raised:
        build.build([kernel_file], arch="sm_80")
    assert "scale.cu does not compile for sm_80" in str(raised.value)
    assert 'scale.cu(2): error: identifier "nothing" is undefined' in str(raised.value)


def test_no_compiler_library_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["/nowhere/libnvrtc.so.13"]))
    with pytest.raises(BackendUnavailableError, match="pip install nvidia-cuda-nvrtc"):
        nvrtc.load.__wrapped__()


def test_both_layouts_of_wheels_are_searched_and_pytorchs_version_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "cu13" / "lib" / "libnvrtc.so.13"
    old = tmp_path / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"
    for file in (new, old):
        file.parent.mkdir(parents=True)
        file.touch()
    (old.parent / "libnvrtc.alt.so.12").touch()

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: Spec)
    monkeypatch.setattr(nvrtc, "_loaded", lambda: None)
    for major, first, second in (("12", old, new), ("13", new, old), (None, new, old)):
        monkeypatch.setattr(nvrtc, "_torch_major", lambda major=major: major)
        assert list(nvrtc._candidates())[:2] == [first, second]


def test_names_of_libraries_tell_their_major_version() -> None:
    names = ("libnvrtc.so.13", "libnvrtc.so.12.8.93", "nvrtc64_120_0.dll", "nvrtc64_130_0.dll")
    assert [nvrtc._major(Path(n)) for n in names] == ["13", "12", "12", "13"]


def test_a_second_build_comes_from_the_disk(
    kernel_file: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.build([kernel_file], arch="sm_80", options=["-DC=1"])
    assert len(list(cache_folder.iterdir())) == 1
    monkeypatch.setattr(nvrtc, "compile", lambda *a, **k: pytest.fail("compiled again"))
    assert build.build([kernel_file], arch="sm_80", options=["-DC=1"]) == first


def test_whatever_changes_a_build_changes_its_key(
    kernel_file: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "compile", lambda *a, **k: (b"code", ""))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 5))

    def number_of_builds() -> int:
        build.build([kernel_file], arch="sm_80", options=["-DC=1"])
        return len(list(cache_folder.iterdir()))

    assert number_of_builds() == number_of_builds() == 1
    build.build([kernel_file], arch="sm_90", options=["-DC=1"])
    build.build([kernel_file], arch="sm_80", options=["-DC=2"])
    assert number_of_builds() == 3
    (kernel_file.parent / "scale.cuh").write_text(HEADER + "// changed")
    assert number_of_builds() == 4
    kernel_file.write_text(SOURCE + "// changed")
    assert number_of_builds() == 5
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 6))
    assert number_of_builds() == 6


@pytest.mark.parametrize("broken", [b"", b"short", bytes(100)])
def test_a_broken_file_of_the_cache_is_made_anew(broken: bytes, cache_folder: Path) -> None:
    cache.cached("key", lambda: b"code")
    (cache_folder / "key").write_bytes(broken)
    assert cache.cached("key", lambda: b"anew") == b"anew"
    assert cache.cached("key", lambda: b"not called") == b"anew"


def test_a_cache_that_cannot_be_written_is_done_without(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_folder.write_text("a file stands in the folder's place")
    assert cache.cached("key", lambda: b"code") == b"code"
    monkeypatch.setattr(cache, "cache_folder", Path("/proc/nowhere").joinpath)
    assert cache.cached("key", lambda: b"code") == b"code"


def test_processes_that_write_the_same_file_at_once_all_read_it_whole(tmp_path: Path) -> None:
    code = (
        "from rwkv_peft.ops.cuda.cache import cached\n"
        "content = bytes(range(256)) * 256\n"
        "for i in range(100):\n"
        "    assert cached(f'key{i}', lambda: content) == content\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in "1234"]
    assert [process.wait() for process in processes] == [0] * 4
    assert len(list((tmp_path / "rwkv-peft" / "kernels").iterdir())) == 100
