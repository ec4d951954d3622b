"""The Triton kernels, for CUDA and ROCm: one file per op with its kernel and its launchers."""
