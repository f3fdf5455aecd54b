"""The machine: pinning, processor time of processes, and the facts that stand beside every number."""

import contextlib
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    *("uvicorn", "uvloop", "httptools", "websockets", "fastapi", "starlette", "pydantic", "onnxruntime", "numpy"),
    *("msgspec", "orjson", "hiredis", "redis", "mosec", "litserve", "torch"),
)
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
    return sum(_cpu_s(each) for each in family(pid))


def _cpu_s(pid: int) -> float:
    """By the process's own clock, which counts nanoseconds; /proc counts ticks of 10 ms."""
    with contextlib.suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3): CPUCLOCK_SCHED of another process
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S
    return 0.0


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


class PageDropper:
    """Gives the memory of written files back at once, so that the next pages written are ones in use a moment ago.

    A virtual machine may take free memory away, and then pays for every page touched anew: on ours 11 microseconds per
    4 KiB, more than Redis needs for a step, whose append-only file grows by 2.4 kB. Its pages come from the page cache
    of the last moments instead, as on a server whose memory has been in use for a while.

    Args:
        folder: Of the files, and of those in folders in it.
        suffix: Of their names.
    """

    _EVERY_S = 0.05

    def __init__(self, folder: Path, suffix: str) -> None:
        self._folder, self._suffix = folder, suffix
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while hasattr(os, "posix_fadvise") and not self._stop.wait(self._EVERY_S):
            for path in self._folder.rglob(f"*{self._suffix}"):
                with contextlib.suppress(OSError), path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def stop(self) -> None:
        """End it."""
        self._stop.set()
        self._thread.join()


def facts(against: Path | None = None) -> dict[str, object]:
    """Machine, versions and commit; and the other checkout's commit, where there is one."""
    return {
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": f"{platform.system()} {platform.release()}",
            "load_before": os.getloadavg(),
        },
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(ROOT),
        "server": _last_change(ROOT),
        **({"base": _commit(against)} if against else {}),
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


def _commit(root: Path) -> str:
    """The commit, with a + where service/ or stepcast/ differ from it."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(root)]
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "service", "stepcast"], text=True)
        return commit + ("+" if changed.strip() else "")
    return "unknown"


def _last_change(root: Path) -> str:
    """The last commit that changed service/ or stepcast/."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(root), "log", "-1", "--format=%h", "--", "service", "stepcast"]
        return subprocess.check_output(git, text=True).strip()
    return "unknown"
