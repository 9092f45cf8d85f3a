"""Settings that every test shares: one thread, no network, the CPU.

Most tests compare bits, and many start processes by forking, which a process that uses a GPU cannot. What a GPU does
is tested apart, and only where it is asked for: GPU_TESTS=1 bash scripts/test.sh tests/test_gpu.py
"""

import os
import signal
import threading

if os.environ.get("GPU_TESTS") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    collect_ignore = ["test_gpu.py"]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that tests start; pytest-xdist may run several tests at once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

from collections.abc import Iterator

import pytest
import torch
from tqdm import tqdm

torch.set_num_threads(1)

# What a shell starts in the background ignores Ctrl-C, and so would the commands that the tests stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# tqdm shares one lock with all forked processes: a child that a test kills while it holds the lock would stop them all.
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))


@pytest.fixture(autouse=True)
def subnormal_floats() -> Iterator[None]:
    """A training flushes them to 0 in its process, for good; hypothesis draws them."""
    yield
    torch.set_flush_denormal(False)
