"""Host memory that this process may still take: what the host has free, and what its cgroups leave."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def available(root: Path = Path("/")) -> int:
    """Return free bytes: the least of the host's MemAvailable and its cgroups' limits.

    Every level of the process's cgroups counts, versions 1 and 2. Where the system says neither, it is all
    physical memory. `root` is where /proc and /sys are looked for.
    """
    return min([*_of_host(root), *_of_cgroups(root)], default=_physical())


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_host(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable"):
            yield int(line.split()[1]) * 1024


def _of_cgroups(root: Path) -> Iterator[int]:
    """Yield what each memory cgroup leaves, from the process's own up to the root of its hierarchy."""
    paths = {}  # of this process, by version
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            paths[1 if controllers else 2] = path
    for line in _lines(root / "proc/self/mountinfo"):
        # "36 35 0:30 <root> <mount point> <options> ... - <type> <source> <super options>", see proc(5)
        fields, _, (kind, _, options) = (part.split() for part in line.partition(" - "))
        version = {"cgroup2": 2, "cgroup": 1}.get(kind)
        if version in paths and (version == 2 or "memory" in options.split(",")):
            mount, path = root / fields[4].lstrip("/"), Path(paths[version])
            # a container's mount begins at its own cgroup, which the path may or may not be told from
            below = path.relative_to(fields[3]) if path.is_relative_to(fields[3]) else Path()
            for folder in (below, *below.parents):
                with contextlib.suppress(OSError, ValueError):  # no limit: no file (a root), or "max"
                    yield _left(mount / folder, version)


def _left(folder: Path, version: int) -> int:
    """Return bytes below a cgroup's limit. Raises OSError or ValueError where it has none."""
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    limit, used = (int((folder / name).read_text()) for name in names)
    stat = dict(line.split() for line in _lines(folder / "memory.stat"))
    # the usage includes the page cache, of which the kernel drops this part rather than kill a process
    cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(0, limit - max(0, used - cache))


def _lines(file: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return file.read_text().splitlines()
    return []
