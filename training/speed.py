"""How fast the device is, how much a step computes, and how much memory it takes."""

import math
import sys
import time
from contextlib import suppress
from functools import cache

import torch


def synchronise(device):
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def peak(device, bf16):
    """Measure the floating-point operations per second of large matrix products."""
    n = 8192 if device.type == "cuda" else 512
    generator = torch.Generator(device).manual_seed(0)  # not the caller's
    # Ones would be faster: they take less power.
    a = torch.randn(n, n, device=device, generator=generator)
    a = a.bfloat16() if bf16 else a
    seconds = math.inf
    for _ in range(5):
        synchronise(device)
        begin = time.perf_counter()
        a @ a
        synchronise(device)
        seconds = min(seconds, time.perf_counter() - begin)
    del a
    if device.type == "cuda":  # the run's memory is counted from here
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * n**3 / seconds


def allow_tf32(device):
    """Multiply float32 matrices in TF32 on a GPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def fast_bf16(device):
    """Whether the device has instructions for products in bfloat16: all recent GPUs and some CPUs.

    Without them, a CPU is far slower in bfloat16 than in float32. An old torch cannot tell: no.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def model_flops(config, row_length, predicted=1.0):
    """Count the floating-point operations of training per token, without recomputation.

    Each weight takes 2 forward and 4 backward (2 for the embedding, whose input needs no gradient);
    attention over the whole row takes 12 L D per layer. predicted: share of the tokens, as only
    these need the vocabulary.
    """
    D, d_time = config.d_model, config.d_time
    layer = 12 * D**2 + 4 * d_time * D + 2 * row_length * D
    return 6 * (config.n_layers * layer + D**2 + 2 * d_time * D) + 10 * predicted * config.K * D


def peak_memory(device):
    """Largest memory in use so far, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(ImportError):  # not on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return math.nan
