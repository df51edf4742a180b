"""What belongs to a build: sources, the headers beside them, options, and the GPU."""

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import rwkv_peft.ops
from rwkv_peft.ops.cuda import nvrtc
from rwkv_peft.ops.cuda.cache import cached


def build(files: Sequence[Path], *, arch: str, options: Sequence[str] = ()) -> bytes:
    """Machine code of the `.cu` files, compiled as one, from the cache on disk if it is there.

    `#include "name.cuh"` finds the `.cuh` files in the folders of `files` and in that of this
    module.

    Raises:
        BackendUnavailableError: see `nvrtc.compile`.
    """
    folders = {Path(__file__).parent, *(f.parent for f in files)}
    paths = sorted(path for folder in folders for path in folder.glob("*.cuh"))
    headers = {path.name: path.read_text(encoding="utf-8") for path in paths}
    source = "".join(
        f'#line 1 "{file.name}"\n{file.read_text(encoding="utf-8")}\n' for file in files
    )
    said = [source, sorted(headers.items()), nvrtc.OPTIONS, options, arch, nvrtc.version()]
    key = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    name = files[0].name
    return cached(
        key,
        lambda: nvrtc.compile(source, arch=arch, name=name, options=options, headers=headers)[0],
    )


def declared_builds() -> Iterator[tuple[tuple[Path, ...], tuple[str, ...]]]:
    """Files and options of every build the package may need.

    Each backend module `rwkv_peft.ops.<operator>.cuda` lists its own as
    `BUILDS = [(files, options), ...]`.
    """
    operators = pkgutil.iter_modules(rwkv_peft.ops.__path__, "rwkv_peft.ops.")
    for operator in operators:
        if operator.ispkg and importlib.util.find_spec(f"{operator.name}.cuda"):
            yield from importlib.import_module(f"{operator.name}.cuda").BUILDS


def compile_all(arch: str) -> int:
    """Compiles every declared build for one GPU, such as 'sm_90', and gives their number.

    Raises:
        BackendUnavailableError: one does not compile.
    """
    builds = list(declared_builds())
    for files, options in builds:
        build(files, arch=arch, options=options)
    return len(builds)
