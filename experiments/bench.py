"""Measure the speed and memory of training and sampling, for experiments/prove.py.

    python -m experiments.bench '["step", "plain", {"K": 27, "n_tokens": 2048, "width": 256}]' 5 cpu

measures one job, [case, variant, sizes], with so many repetitions on a device, and prints its
figures. A time is the median over the repetitions. Memory is what a call needs in addition to what
is there before it: weights, optimizer state and, for "operations", gradients.
"""

import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import torch

import bfn
import data
import train
from common import cli
from common.noise import draw_keys
from model import BFNTransformer, Config
from text import cache, toy
from text.tokenizer import load_tokenizer, train_tokenizer
from training import forms, fused, speed

# ---------------------------------------------------------------- measuring


def memory_now(device, peak=False):
    """Read the memory in use, or the most since `forget_peak`, in MB.

    On a CPU that of this process, and 0 if the system is not Linux.
    """
    if device.type == "cuda":
        read = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return read(device) / 1e6
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM" if peak else "VmRSS"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def forget_peak(device):
    """Start measuring the most memory in use from now on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def seconds_of(call, device):
    """Call once -> seconds."""
    begin = time.perf_counter()
    call()
    speed.synchronise(device)
    return time.perf_counter() - begin


def measure(call, device, n_tokens, repetitions, flops=0.0):
    """Call once to warm up, then `repetitions` times -> {figure: value}."""
    seconds_of(call, device)
    forget_peak(device)
    before = memory_now(device)
    median = statistics.median(seconds_of(call, device) for _ in range(repetitions))
    memory = memory_now(device, peak=True) - before
    per_second = dict(tokens_per_s=n_tokens / median, flops_per_s=flops / median)
    return dict(seconds=median, memory_mb=memory) | per_second


# ---------------------------------------------------------------- cases: variant -> {figure: value}


def operations(device, repetitions, variant, K, n_tokens, width):
    """Measure only the input and the loss, forward and backward."""
    torch.manual_seed(0)
    E, W = (torch.nn.Parameter(0.02 * torch.randn(K, width, device=device)) for _ in range(2))
    bias = torch.nn.Parameter(torch.zeros(K, device=device))
    for p in (E, W, bias):
        p.grad = torch.zeros_like(p)
    ids = torch.randint(K, (1, n_tokens), device=device)
    t = torch.rand(1, n_tokens, device=device)
    scale = torch.full((1, n_tokens), 1 / n_tokens, device=device)
    predicted = torch.arange(n_tokens, device=device)
    s1, compiled = 5.9, "compiled" in variant

    def plain():
        theta = bfn.flow(ids, t, s1, K).softmax(-1)
        logits = (theta @ E) @ W.T + bias + theta.clamp(min=1e-37).log()
        return (bfn.training_loss(logits.float().log_softmax(-1), ids, t, s1) * scale).sum()

    def in_chunks():
        keys = draw_keys(1, n_tokens, device=device)
        noisy = fused.Noisy(ids, t, keys, predicted, s1, compiled)
        return fused.HiddenToLoss.apply(fused.ThetaToH.apply(E, noisy), W, bias, scale, noisy)

    call = in_chunks if "fused" in variant else plain
    if variant == "plain, compiled":
        call = torch.compile(plain, dynamic=False)

    def forward_and_backward():
        with torch.autocast(device.type, torch.bfloat16, enabled=speed.fast_bf16(device)):
            loss = call()
        loss.backward()

    return measure(forward_and_backward, device, n_tokens, repetitions, 10 * K * width * n_tokens)


def step(device, repetitions, variant, K, n_tokens, width, n_layers=8, row_length=64):
    """Measure a whole training step on packed rows."""
    B = n_tokens // row_length
    words = f"-d=none -slen={row_length} -bsz={B} -nl={n_layers} -mdim={width} --max_steps=1000"
    words += f" --fused={'on' if 'fused' in variant else 'off'}"
    words += f" --compile={'on' if 'compiled' in variant else 'off'}"
    args = train.complete(train.flags().parse_args(words.split()))
    config = train.make_config(args, K)
    state = train.build(config, args, device, None)
    torch.manual_seed(0)
    segment_ids = 1 + (torch.rand(B, row_length) < 0.05).cumsum(1)
    nothing = torch.zeros_like(segment_ids, dtype=torch.bool)
    batch = torch.randint(K, segment_ids.shape), segment_ids, nothing
    forms.choose_form(state, batch, args, device, train.accumulate_gradients)

    def call():
        train.accumulate_gradients(state.model, [batch], [0], device)
        train.update_weights(state, args)

    flops = speed.model_flops(config, row_length) * n_tokens
    return measure(call, device, n_tokens, repetitions, flops)


def text(device, repetitions, variant, n_sentences=50_000):
    """Measure tokenising a corpus, or loading batches."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, path = Path(folder) / "corpus.txt", Path(folder) / "tokenizer.model"
        corpus.write_text(toy.corpus(n_sentences) * 4)
        path.write_bytes(train_tokenizer(corpus, "bpe", 1000))
        tokenizer = load_tokenizer(path)
        tokens = cache.load_corpus(corpus, tokenizer, Path(folder) / "cache")
        loader = data.Loader(tokens, 64, 128, seed=0)
        numbers = count()

        def tokenise():  # each time into a new cache
            cache.load_corpus(corpus, tokenizer, Path(folder) / f"cache{next(numbers)}")

        def load():
            for _ in range(20):
                loader.batch(next(numbers))

        call, n_tokens = (tokenise, len(tokens.ids)) if variant == "tokenise" else (load, 163_840)
        return measure(call, device, n_tokens, repetitions)


def sampling(device, repetitions, variant, K, rows, length=64, width=256, n_layers=4):
    """Measure a sampler with a number of steps, for example "pace 10"."""
    sampler, n_steps = variant.split()
    controls = bfn.Controls(sampler, int(n_steps))
    config = Config(K, bfn.auto_beta1(K), width, n_layers, 8)
    model = BFNTransformer(config).to(device).eval()
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    network = partial(model, segment_ids=torch.ones_like(ids))
    call = partial(bfn.sample, network, ids, ids.bool(), config.s1, K, controls)
    return measure(call, device, rows * length, repetitions)


CASES = {f.__name__: f for f in (operations, step, text, sampling)}


# ---------------------------------------------------------------- one job


def main():
    job, repetitions, device = sys.argv[1:]
    case, variant, sizes = json.loads(job)
    device = torch.device(device)
    speed.allow_tf32(device)
    print(json.dumps(CASES[case](device, int(repetitions), variant, **sizes)))


if __name__ == "__main__":
    cli.run(main)
