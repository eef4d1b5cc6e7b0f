"""Builds the CUDA kernels for the host: see cuda_on_host.h."""
