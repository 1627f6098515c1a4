"""How much memory of this machine a process may still take."""

from pathlib import Path

_UNLIMITED = 1 << 60


def free_host_memory() -> int | None:
    """Bytes: of the machine, or of the container where that has less. None where the system does not say."""
    found = [size for size in (_of_machine(), _of_container()) if size is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _of_container() -> int | None:
    """What a control group of either version leaves; files in its cache count as free."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            most = int((root / limit).read_text())
            taken = int((root / used).read_text())
            statistics = (root / limit).with_name("memory.stat").read_text().split()
        except (OSError, ValueError):
            continue
        if most < _UNLIMITED:
            cached = dict(zip(statistics[::2], statistics[1::2])).get("inactive_file", "0")
            return most - taken + int(cached)
    return None
