"""Memory of the tests' process: its size, and tensors larger than what they take."""

import mmap
import sys
import threading
from pathlib import Path

import torch

SAMPLE_INTERVAL_S = 0.005
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


def create_sparse(num_bytes: int) -> torch.Tensor:
    """Return zeros, uint8, that take memory only where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=torch.uint8)


def read_memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes, on Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


class PeakMemory:
    """Samples the anonymous memory of this process, which no file backs, while a block runs."""

    def __enter__(self):
        self.peak, self.is_done = 0, threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()
        return self

    def sample(self):
        while not self.is_done.wait(SAMPLE_INTERVAL_S):
            self.peak = max(self.peak, read_memory("RssAnon"))

    def __exit__(self, *exception):
        self.is_done.set()
        self.thread.join()
        self.peak = max(self.peak, read_memory("RssAnon"))
