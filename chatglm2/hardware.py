"""Free memory and disk space, processor cores, addresses: of the machine or of its container."""

import os
import re
import shutil
import socket
import sys
from pathlib import Path

import torch


def get_free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a device; `None` where they cannot be read."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type == "cpu" and sys.platform == "linux":
        return read_free_memory(Path("/"))
    return None


def get_free_space(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def find_group_folders(root: Path, controller: str) -> list[tuple[int, Path]]:
    """Return version (1 or 2) and folder of each control group of this process."""
    own_groups = root / "proc/self/cgroup"
    folders = []
    for line in own_groups.read_text().splitlines() if own_groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, mount = 2, "sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, mount = 1, f"sys/fs/cgroup/{controller}"
        else:
            continue
        group = Path(path.lstrip("/"))
        folders += [(version, root / mount / parent) for parent in (group, *group.parents)]
    return folders


def read_free_memory(root: Path) -> int | None:
    """Return the bytes that are free in Linux and in the control groups of this process."""
    meminfo, free = root / "proc/meminfo", []
    if meminfo.exists() and (match := re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())):
        free.append(1024 * int(match[1]))
    for version, folder in find_group_folders(root, "memory"):
        files = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if (left := read_group_memory(folder, *files)) is not None:
            free.append(left)
    return min(free, default=None)


def read_group_memory(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    """Return the limit of a control group minus its usage; cached file pages are not counted."""
    if (
        not (folder / limit).exists()
        or (bytes_limit := (folder / limit).read_text().strip()) == "max"
    ):
        return None
    match = re.search(rf"^{cached} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
    reclaimable = int(match[1]) if match else 0
    return int(bytes_limit) - int((folder / usage).read_text()) + reclaimable


def choose_threads() -> int | None:
    """Return the number of threads for computing on the CPU; `None` leaves it to PyTorch.

    One for each physical core that this process may use, because two hyperthreads share the
    arithmetic units of a core; at most the CPU quota of its control groups, rounded down. A thread
    beyond the quota is paused for a part of each period, and all others wait for it.

    PyTorch chooses well if `OMP_NUM_THREADS` is set, and on other systems than Linux.
    """
    if sys.platform != "linux" or os.environ.get("OMP_NUM_THREADS"):
        return None
    cores = count_cores(Path("/"), os.sched_getaffinity(0))
    quota = read_cpu_quota(Path("/"))
    return cores if quota is None else max(1, min(cores, int(quota)))


def count_cores(root: Path, processors: set[int]) -> int:
    """Return the number of physical cores that the given logical processors belong to."""
    cores = set()
    for processor in processors:
        siblings = root / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
        cores.add(siblings.read_text() if siblings.exists() else processor)
    return len(cores)


def read_cpu_quota(root: Path) -> float | None:
    """Return the CPU quota of the control groups, in processors; `None` is no limit."""
    quotas = []
    for version, folder in find_group_folders(root, "cpu"):
        if version == 2:
            names, unlimited = ("cpu.max",), "max"
        else:
            names, unlimited = ("cpu.cfs_quota_us", "cpu.cfs_period_us"), "-1"
        if not all((folder / name).exists() for name in names):
            continue
        quota, period = " ".join((folder / name).read_text() for name in names).split()
        if quota != unlimited:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address of this machine; port 0 is a free one.

    Raises:
        socket.gaierror: The host has no address.
        OSError: The port is taken, or this machine does not have the address.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except UnicodeError as error:  # e.g. a part of more than 63 letters
        raise socket.gaierror(socket.EAI_NONAME, f"no name of a host ({error})") from error
    is_dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, dualstack_ipv6=is_dual)
