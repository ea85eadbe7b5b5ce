"""Triton kernels, each beside the ATen expression it replaces and the test that compares the two.

The ZeRO passes need none: their casts and divisions are fused by Inductor. Kernels that passes lower to
live here, below the runtime, so that they can be read, tested and compiled without the compiler.
"""
