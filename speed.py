"""What the device can do, and what training asks of it."""

import math
import sys
import time
from contextlib import suppress
from functools import cache

import torch


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def matmul_peak(device, dtype):
    """Floating-point operations a second that large matrix products reach here."""
    n = 8192 if device.type == "cuda" else 512
    generator = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay as they are
    a = torch.randn(n, n, device=device, generator=generator).to(dtype)  # ones take less power, and are faster for it
    seconds = math.inf
    for _ in range(5):
        synchronise(device)
        begin = time.perf_counter()
        a @ a
        synchronise(device)
        seconds = min(seconds, time.perf_counter() - begin)
    del a
    if device.type == "cuda":  # a run's memory is counted from here on
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * n**3 / seconds


@cache
def fast_bf16(device):
    """Whether the device multiplies bfloat16 matrices fast: every recent GPU, few CPUs, which are asked.

    A CPU must be four times as fast in it: that is never a matter of how busy it is.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return matmul_peak(device, torch.bfloat16) > 4 * matmul_peak(device, torch.float32)


def peak(device):
    """Floating-point operations a second, in the dtype that training multiplies matrices in."""
    return matmul_peak(device, torch.bfloat16 if fast_bf16(device) else torch.float32)


def model_flops(config, row_length):
    """Floating-point operations that a token takes in training, forward and backward, without recomputation.

    2 a weight forward and 4 backward (2 for the embedding, whose input needs no gradient), and 12 L D a layer for
    attention over the whole row.
    """
    D, d_time = config.d_model, config.d_time
    layer = 12 * D**2 + 4 * d_time * D
    return 6 * (config.n_layers * (layer + 2 * row_length * D) + D**2 + 2 * d_time * D) + 10 * config.K * D


def peak_memory(device):
    """Largest memory in use so far, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(ImportError):  # not on Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return math.nan
