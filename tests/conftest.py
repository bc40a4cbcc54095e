import copy
import os
import signal
import sys
from pathlib import Path

import pytest

# The tests' tensors are small: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Everything is tested on the CPU, where results are the same bit for bit.
if not os.environ.get("BFN_TEST_CUDA"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A shell's background job, and what it starts, would ignore Ctrl-C, and under nohup a hang-up.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from untrained import make_run

from text import toy
from training.checkpoint import load


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes many seconds; README's command leaves it out")


@pytest.fixture(scope="session", params=["bpe", "word", "char"])
def run_dir(request, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / request.param, request.param, toy.corpus(300))


@pytest.fixture(scope="session")
def loaded(run_dir):
    return load(run_dir)


@pytest.fixture(scope="session")
def mixing(loaded):
    """A run whose network mixes positions and knows the time.

    The layers of an untrained one do nothing yet.
    """
    model, tokenizer, run = loaded
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return model, tokenizer, run


@pytest.fixture(params=["bpe", "char", "word"])
def poems(request, tmp_path):
    """A run whose examples have several lines."""
    text = "\n\n".join(["the king\nsleeps", "anna\nsees the\nboat"] * 60)
    return make_run(tmp_path / request.param, request.param, text, "paragraph")
