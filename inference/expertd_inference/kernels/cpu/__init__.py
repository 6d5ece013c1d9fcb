"""Kernels of the CPU: native code, and the reference that all kernels are tested against."""
