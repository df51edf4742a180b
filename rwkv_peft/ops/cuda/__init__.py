"""Kernels for NVIDIA GPUs without a compiler on the user's machine.

`nvrtc` compiles a source at its first use with the library that PyTorch brings, `cache` keeps the
result on disk, `build` says what belongs to a build, `driver` loads and launches kernels, and
`launch` is what the backends of the operators share.

Sources are `extern "C"` kernels that include no header of the host. They lie beside their
operator, in `ops/<operator>/kernels`; `#include "name.cuh"` finds the headers beside them and those
in this folder. A backend module `ops/<operator>/cuda.py` lists every (files, options) that it may
compile in `BUILDS`. A test compiles all of them for sm_80, sm_89, sm_90 and sm_90a, and fails for a
`.cu` file that is in no list.

`warpgroup_mma.cuh` is the only file that knows an instruction of one generation of GPUs: `wgmma` of
Hopper, for bf16 in chunks of 64. Tiles in shared memory are swizzled as `wgmma` reads them, and a
warp has the same rows of a result as `wgmma` gives it, so that each kernel is written once.

`driver.load_kernel(files, name, device_index=, signature="PPi", shared_bytes=, options=)` gives a
kernel. `kernel(grid, block, *numbers)` prepares a launch of it, once for a shape of inputs and a
thread, and `launch(*addresses)` puts it on the current stream: from call to call only addresses
change. What lives within one direction is one allocation, whose parts are addresses and not views.
What the chunks add to the state lies where the states are written afterwards.
`tests/ops/test_cuda_launch.py` holds the memory and the number of Python functions of a call.

`tests/ops/emulation` compiles the same sources with g++ and runs them on a CPU, with a fiber for
each thread. There the results of every kernel are held against the error budget; races and speed
it does not see.
"""
