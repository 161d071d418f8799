"""Decoding from one arena of pages at fixed addresses: what CUDA graphs and the Triton kernels need."""
