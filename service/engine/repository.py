"""Which models and versions exist, which is live; new versions go live without dropping a session."""

import logging
from contextlib import suppress
from pathlib import Path
from threading import Lock

from stepcast.calendars import check_calendar
from stepcast.errors import ManifestError, ModelNotFound, VersionFailed
from stepcast.manifest import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE

from .batch_invariance import try_batches
from .model import Runtime

log = logging.getLogger("stepcast.repository")

Stamp = dict[str, tuple[int, int, int]]
"""Time of change (ns), size and inode of each file of a version that is there."""


class Served:
    """One model version that has proved its golden file; batches of up to `batch_rows` rows were tried."""

    def __init__(self, runtime: Runtime, batch_rows: int) -> None:
        self.runtime, self.manifest = runtime, runtime.manifest
        self.batch_invariance = try_batches(runtime, batch_rows)
        self.name, self.version, self.n_features = self.manifest.name, self.manifest.version, self.manifest.n_features
        self.fingerprint = bytes.fromhex(self.manifest.fingerprint)
        self.input_bytes = 4 * self.n_features  # of one row's inputs by one step
        outputs = self.manifest.classes or tuple(output.name for output in self.manifest.outputs)
        self.names = self.manifest.spelling, outputs  # what a position means


class Repository:
    """The models of a directory <root>/<name>/<version>/.

    Every version that reproduces its golden.npz is served, the others are reported; the highest one is live.
    """

    def __init__(
        self, root: Path, *, device: str, threads: int, resident_bytes: int = 0, batch_rows: int = 256
    ) -> None:
        self.root = root
        self._device, self._threads, self._resident_bytes = device, threads, resident_bytes
        self._batch_rows = batch_rows
        self._served: dict[str, dict[int, Served]] = {}
        self._live: dict[str, Served] = {}
        self.changes = 0  # of what is live
        self._retired: set[tuple[str, int]] = set()
        self._failed: dict[Path, Stamp] = {}  # not served, as they were then: loading them again would change nothing
        self.failures: dict[str, str] = {}  # why a version is not served, by its directory
        self._loading = Lock()

    def scan(self) -> list[Served]:
        """Load what is new, let go of nothing; the versions that went into service.

        Blocking: call it in a thread while requests are served. Raises ManifestError where the directory is not there.
        """
        if not self.root.is_dir():
            raise ManifestError(f"model repository {str(self.root)!r} is not a directory")
        with self._loading:
            gone = [directory for directory in self.failures if not Path(directory).is_dir()]
            for directory in gone:
                del self.failures[directory]
            there = sorted(
                {path.parent for name in (MANIFEST_FILE, "*.onnx") for path in self.root.glob(f"*/*/{name}")}
            )
            return [served for served in map(self._take, there) if served is not None]

    def load(self, name: str, version: int) -> Served:
        """Load a version now, although it was retired or has failed before; one that is served stays as it is.

        Blocking, as `scan` is. Raises ModelNotFound where there is no such directory, VersionFailed where it does not
        prove itself.
        """
        directory = self.root / name / str(version)
        with self._loading:
            served = self.get(name, version)
            if served is not None:
                return served
            if directory not in self.root.glob("*/*"):  # a name may be ".."
                raise ModelNotFound(f"the repository has no version {version} of model {name!r}", model=name)
            self._retired.discard((name, version))
            self._failed.pop(directory, None)
            served = self._take(directory)
        if served is None:
            reason = self.failures[str(directory)]
            raise VersionFailed(f"version {version} of model {name!r} is not served: {reason}", model=name)
        return served

    def failed(self) -> list[tuple[str, int, str]]:
        """(model, version, why) of each version that is there and not served."""
        found = [(Path(directory), reason) for directory, reason in list(self.failures.items())]
        return sorted((at.parent.name, int(at.name), reason.replace(f"{self.root}/", "")) for at, reason in found)

    def _take(self, directory: Path) -> Served | None:
        """Serve what is in a directory, if that is new and good."""
        served = self._load(directory)
        if served is not None:
            self._served.setdefault(served.name, {})[served.version] = served
            self._look(served.name)
            self.failures.pop(str(directory), None)
        return served

    def _look(self, name: str) -> None:
        """Find out which version of a model is live."""
        versions = self._served[name]
        if versions:
            self._live[name] = versions[max(versions)]
        else:
            del self._served[name], self._live[name]
        self.changes += 1  # last: who sees the new number finds the new version

    def _load(self, directory: Path) -> Served | None:
        """A version that has reproduced its golden.npz, as fast as it goes here; None: it is known, or has not."""
        name, version = directory.parent.name, directory.name
        if not (version.isascii() and version.isdigit()) or int(version) in self._served.get(name, {}):
            return None
        stamp = _stamp(directory)
        if (name, int(version)) in self._retired or self._failed.get(directory) == stamp:
            return None
        try:
            runtime = Runtime(directory, device=self._device, threads=self._threads)
            found = runtime.manifest
            check_calendar(found)
            if (found.name, found.version) != (name, int(version)):
                raise ManifestError(f"{directory}: manifest.json is of {found.name}/{found.version}")
            runtime.prove()
        except ManifestError as error:
            log.error("not served: %s", error)
            self._failed[directory], self.failures[str(directory)] = stamp, str(error)
            return None
        runtime.quicken()
        if runtime.device == "cuda" and self._resident_bytes:
            runtime.reside(self._resident_bytes)
        served = Served(runtime, self._batch_rows)
        log.info("serving %s version %s on %s: %s", name, version, runtime.device, served.batch_invariance)
        return served

    def names(self) -> list[str]:
        """Models with at least one served version, sorted."""
        return sorted(self._served)

    def versions(self, name: str) -> list[int]:
        """Served versions of a model, ascending; raises ModelNotFound where none is."""
        return sorted(self._of(name))

    def mixed(self, name: str) -> bool:
        """Whether served versions of a model take different numbers of features."""
        return len({served.n_features for served in list(self._served.get(name, {}).values())}) > 1

    def renamed(self, name: str) -> bool:
        """Whether served versions of a model differ in the names of features or outputs, or in their order."""
        return len({served.names for served in list(self._served.get(name, {}).values())}) > 1

    def live(self, name: str) -> Served:
        """The highest served version; raises ModelNotFound where none is."""
        live = self._live.get(name)
        if live is None:
            raise self._not_served(name)
        return live

    def get(self, name: str, version: int) -> Served | None:
        """One served version, None if it is not served."""
        return self._served.get(name, {}).get(version)

    def require(self, name: str, version: int) -> Served:
        """One served version; raises ModelNotFound where it is not served."""
        served = self._of(name).get(version)
        if served is None:
            text = f"model {name!r} has no version {version}, it has {self.versions(name)}"
            # Problem documents are encoded with integers of 64 bits.
            raise ModelNotFound(text, model=name, version=version if version.bit_length() < 64 else str(version))
        return served

    def retire(self, name: str, version: int) -> None:
        """Stop serving a version until the server starts again; its files stay."""
        self.require(name, version)
        self._retired.add((name, version))
        del self._served[name][version]
        self._look(name)

    def _of(self, name: str) -> dict[int, Served]:
        versions = self._served.get(name)
        if not versions:
            raise self._not_served(name)
        return versions

    def _not_served(self, name: str) -> ModelNotFound:
        return ModelNotFound(f"model {name!r} is not served, there are {self.names()}", model=name)


def _stamp(directory: Path) -> Stamp:
    stamp = {}
    for name in (MODEL_FILE, MANIFEST_FILE, GOLDEN_FILE):
        with suppress(OSError):
            found = (directory / name).stat()
            stamp[name] = found.st_mtime_ns, found.st_size, found.st_ino
    return stamp
