"""The machine: pinning, processor time of processes, and the facts that stand beside every number."""

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    *("uvicorn", "uvloop", "httptools", "websockets", "fastapi", "starlette", "pydantic", "onnxruntime", "numpy"),
    *("msgspec", "orjson", "hiredis", "redis", "mosec", "litserve", "torch"),
)
_FREE_SHARE = 0.04
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cores() -> tuple[int, int]:
    """The core of the servers and the core of the load generator (and Redis); the same one where there is only one."""
    free = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    return free[0], free[-1]


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """Run on one core; processes started meanwhile stay there."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_s(pid: int) -> float:
    """Processor seconds that a process and all its descendants have used so far."""
    total = 0.0
    for each in family(pid):
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{each}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) * _TICK_S
    return total


def memory_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{each}/task").iterdir():
                found += [int(child) for child in (thread / "children").read_text().split()]
    return found


class FullMemory:
    """Memory as on a machine that has been up for a while: what nobody uses holds pages of files.

    A virtual machine may give free memory back to its host, and then pays for every page that it touches anew, also
    for those of a file that grows: on one of ours 11 microseconds per 4 KiB, and Redis' append-only file grows by
    2.4 kB per step. Where little memory is free, pages are taken from the oldest files instead, as on any server.

    Args:
        folder: For a file without content; its pages are read, never written.
    """

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / "nothing", os.O_RDWR | os.O_CREAT)
        self._at, self._size = 0, 0
        self._buffer = bytearray(1 << 20)

    def fill(self) -> None:
        """Read until little memory is free."""
        total, free = _memory_kib("MemTotal"), _memory_kib("MemFree")
        while free > _FREE_SHARE * total:
            step = 1 << 26
            self._size += step
            os.ftruncate(self._file, self._size)
            while self._at < self._size:
                self._at += os.preadv(self._file, [self._buffer], self._at)
            before, free = free, _memory_kib("MemFree")
            if free >= before:  # a file system without such pages, or somebody gives memory back
                break

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


def _memory_kib(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/meminfo has no {name}")


def facts() -> dict[str, object]:
    """Machine, versions and commit."""
    return {
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": f"{platform.system()} {platform.release()}",
            "load_before": os.getloadavg(),
        },
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _commit() -> str:
    """The commit, with a + where service/ or stepcast/ differ from it."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "service", "stepcast"], text=True)
        return commit + ("+" if changed.strip() else "")
    return "unknown"
