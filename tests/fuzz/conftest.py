"""A limit on memory around every test here: what asks for more fails, and not the machine."""

import sys
from collections.abc import Iterator

import pytest

# bytes beside those that the process has mapped already
MORE = 6 << 30


@pytest.fixture(autouse=True)
def limited_memory() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MORE, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
