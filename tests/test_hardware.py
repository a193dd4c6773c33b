"""`hardware`: free memory and processor cores, within control groups."""

import os
import sys

import pytest
import torch

from chatglm2 import hardware

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


@pytest.mark.parametrize(
    ("read", "files", "expected"),
    [
        (hardware.read_free_memory, {}, None),
        (hardware.read_free_memory, MEMINFO, 16 * GIB),
        (hardware.read_free_memory, MEMINFO | V2, 4 * GIB),
        (hardware.read_free_memory, V1, 3 * GIB),
        (hardware.read_cpu_quota, {}, None),
        (hardware.read_cpu_quota, QUOTA_V2, 2.5),
        (hardware.read_cpu_quota, QUOTA_V1, 0.5),
        (hardware.read_cpu_quota, QUOTA_V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, None),
    ],
)
def test_control_groups(tmp_path, read, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read(tmp_path) == expected


def test_free_memory_of_a_mac(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 11 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * GIB)
    assert hardware.get_free_memory(torch.device("mps")) == 8 * GIB


def test_hyperthreads_are_one_core(tmp_path):
    siblings = {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5", 2: "2,6"}
    for processor, text in siblings.items():
        folder = tmp_path / f"sys/devices/system/cpu/cpu{processor}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
    assert hardware.count_cores(tmp_path, {0, 4}) == 1
    assert hardware.count_cores(tmp_path, {0, 1, 2, 4, 5}) == 3
    assert hardware.count_cores(tmp_path, {0, 4, 8, 9}) == 3  # of 8 and 9 nothing is known


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; elsewhere PyTorch chooses")
def test_this_machine(monkeypatch):
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < hardware.get_free_memory(torch.device("cpu")) < total
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    processors = os.sched_getaffinity(0)
    assert 1 <= hardware.choose_threads() <= len(processors)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {min(processors)})
    assert hardware.choose_threads() == 1


@pytest.mark.parametrize(
    ("platform", "openmp", "cores", "quota", "expected"),
    [
        ("linux", "", 8, None, 8),
        ("linux", "", 8, 2.5, 2),
        ("linux", "", 8, 0.5, 1),
        ("linux", "", 2, 3.0, 2),
        ("linux", "3", 8, None, None),
        ("darwin", "", 8, None, None),
    ],
)
def test_threads(monkeypatch, platform, openmp, cores, quota, expected):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", openmp)
    monkeypatch.setattr(hardware, "count_cores", lambda root, processors: cores)
    monkeypatch.setattr(hardware, "read_cpu_quota", lambda root: quota)
    assert hardware.choose_threads() == expected
