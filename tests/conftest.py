import os
import signal
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the tests' tensors are small: more threads only wait for each other
if not os.environ.get(
    "BFN_TEST_CUDA"
):  # everything is tested on the CPU, where results are the same bit for bit
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job, and what it starts, would ignore Ctrl-C

sys.path.insert(0, str(Path(__file__).parent.parent))
