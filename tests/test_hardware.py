"""`hardware`: free memory and processor cores, within control groups."""

import os
import sys
from pathlib import Path

import pytest
import torch

from chatglm2 import hardware


def write_files(root: Path, files: dict[str, str]):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


GIB = 1024**3
MEMINFO = {"proc/meminfo": "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n"}
V2 = {
    "proc/self/cgroup": "0::/user/chat\n",
    "sys/fs/cgroup/user/memory.max": str(8 * GIB),
    "sys/fs/cgroup/user/memory.current": str(5 * GIB),
    "sys/fs/cgroup/user/memory.stat": f"anon 7\ninactive_file {GIB}\n",
    "sys/fs/cgroup/user/chat/memory.max": "max\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": str(6 * GIB),
    "sys/fs/cgroup/memory/memory.usage_in_bytes": str(4 * GIB),
    "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [({}, None), (MEMINFO, 16 * GIB), (MEMINFO | V2, 4 * GIB), (V1, 3 * GIB)],
    ids=["nothing", "machine", "control groups 2", "control groups 1, a container"],
)
def test_free_memory(tmp_path, files, expected):
    write_files(tmp_path, files)
    assert hardware.read_free_memory(tmp_path) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_free_memory_of_this_machine():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < hardware.get_free_memory(torch.device("cpu")) < total


def test_free_memory_of_a_mac(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 11 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * GIB)
    assert hardware.get_free_memory(torch.device("mps")) == 8 * GIB


# Processors.

QUOTA_V2 = {
    "proc/self/cgroup": "0::/user/chat\n",
    "sys/fs/cgroup/user/cpu.max": "250000 100000\n",
    "sys/fs/cgroup/user/chat/cpu.max": "max 100000\n",
}
QUOTA_V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n0::/\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",  # a container sees its own group here
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}
UNLIMITED_V1 = QUOTA_V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [({}, None), (QUOTA_V2, 2.5), (QUOTA_V1, 0.5), (UNLIMITED_V1, None)],
    ids=["nothing", "control groups 2", "control groups 1", "no limit"],
)
def test_cpu_quota(tmp_path, files, expected):
    write_files(tmp_path, files)
    assert hardware.read_cpu_quota(tmp_path) == expected


def test_hyperthreads_are_one_core(tmp_path):
    siblings = {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5", 2: "2,6"}
    for processor, text in siblings.items():
        folder = f"sys/devices/system/cpu/cpu{processor}/topology"
        write_files(tmp_path, {f"{folder}/thread_siblings_list": f"{text}\n"})
    assert hardware.count_cores(tmp_path, {0, 4}) == 1
    assert hardware.count_cores(tmp_path, {0, 1, 2, 4, 5}) == 3
    assert hardware.count_cores(tmp_path, {0, 4, 8, 9}) == 3  # of 8 and 9 nothing is known


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch chooses")
@pytest.mark.parametrize(
    ("cores", "quota", "expected"),
    [(8, None, 8), (8, 2.5, 2), (8, 0.5, 1), (2, 3.0, 2), (4, 4.0, 4)],
)
def test_threads(monkeypatch, cores, quota, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(hardware, "count_cores", lambda root, processors: cores)
    monkeypatch.setattr(hardware, "read_cpu_quota", lambda root: quota)
    assert hardware.choose_threads() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch chooses")
def test_threads_of_this_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one = min(os.sched_getaffinity(0))
    assert 1 <= hardware.choose_threads() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {one})
    assert hardware.choose_threads() == 1


def test_threads_are_left_to_openmp_and_to_other_systems(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert hardware.choose_threads() is None
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert hardware.choose_threads() is None
