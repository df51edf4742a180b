"""NVIDIA kernels without a compiler on the user's machine.

`nvrtc` compiles a source at first use with the library that PyTorch brings, `cache` keeps the
result on disk, `build` says what belongs to a build, and `driver` loads and launches kernels.
"""
