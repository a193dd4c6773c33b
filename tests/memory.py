"""Reads the memory of the tests' process, on Linux."""

import threading
from pathlib import Path

SAMPLE_INTERVAL_S = 0.005


def read_memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
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
