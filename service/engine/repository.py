"""Which models and versions exist, which is live; new versions go live without dropping a session."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from stepcast.errors import ManifestError, ModelNotFound
from stepcast.manifest import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE, Manifest

from .golden import Proof
from .model import Runtime

log = logging.getLogger("stepcast.repository")

Stamp = list[tuple[int, int, int] | None]
"""Time of change (ns), size and inode of each file of a version, None where it is not there."""


@dataclass(slots=True)
class Served:
    """One model version that has proved its golden file."""

    runtime: Runtime
    proof: Proof
    manifest: Manifest = field(init=False)
    name: str = field(init=False)
    version: int = field(init=False)
    fingerprint: bytes = field(init=False)
    n_features: int = field(init=False)
    input_bytes: int = field(init=False)  # of one row's inputs by one step
    names: tuple[object, ...] = field(init=False)  # of features and outputs, in order: what a position means

    def __post_init__(self) -> None:
        manifest = self.manifest = self.runtime.manifest
        self.name, self.version, self.n_features = manifest.name, manifest.version, manifest.n_features
        self.fingerprint, self.input_bytes = bytes.fromhex(manifest.fingerprint), 4 * manifest.n_features
        outputs = manifest.classes or tuple(output.name for output in manifest.outputs)
        self.names = tuple((feature.name, feature.width) for feature in manifest.features), outputs


class Repository:
    """The models of a directory <root>/<name>/<version>/.

    Every version whose golden.npz is reproduced is served; the highest one is live. A version that fails is reported
    and not served, the others go on.
    """

    def __init__(self, root: Path, *, device: str, threads: int, resident_bytes: int = 0) -> None:
        self.root = root
        self._device, self._threads, self._resident_bytes = device, threads, resident_bytes
        self._served: dict[str, dict[int, Served]] = {}
        self._live: dict[str, Served] = {}
        self._mixed: set[str] = set()
        self._renamed: set[str] = set()
        self.changes = 0  # of what is live
        self._retired: set[tuple[str, int]] = set()
        self._failed: dict[Path, Stamp] = {}  # not served, as they were then: loading them again would change nothing
        self.failures: dict[str, str] = {}  # why a version is not served, by its directory

    def scan(self) -> list[Served]:
        """Load what is new, let go of nothing. Blocking: call it in a thread while requests are served.

        Returns:
            The versions that went into service.

        Raises:
            ManifestError: the directory itself is not there.
        """
        if not self.root.is_dir():
            raise ManifestError(f"model repository {str(self.root)!r} is not a directory")
        fresh = []
        for directory in sorted(p.parent for p in self.root.glob(f"*/*/{MANIFEST_FILE}")):
            served = self._load(directory)
            if served is not None:
                self._served.setdefault(served.name, {})[served.version] = served
                self._look(served.name)
                fresh.append(served)
        return fresh

    def _look(self, name: str) -> None:
        """Find out which version of a model is live, and whether they differ in features or names."""
        versions = self._served.get(name, {})
        mixed = len({served.n_features for served in versions.values()}) > 1
        (self._mixed.add if mixed else self._mixed.discard)(name)
        renamed = len({served.names for served in versions.values()}) > 1
        (self._renamed.add if renamed else self._renamed.discard)(name)
        if versions:
            self._live[name] = versions[max(versions)]
        else:
            self._live.pop(name, None)
        self.changes += 1  # last: who sees the new number finds the new version

    def _load(self, directory: Path) -> Served | None:
        name, version = directory.parent.name, directory.name
        if not (version.isascii() and version.isdigit()) or int(version) in self._served.get(name, {}):
            return None
        stamp = _stamp(directory)
        if (name, int(version)) in self._retired or self._failed.get(directory) == stamp:
            return None
        try:
            served = self._proved(directory)
        except ManifestError as error:
            log.error("not served: %s", error)
            self._failed[directory], self.failures[str(directory)] = stamp, str(error)
            return None
        self._failed.pop(directory, None)
        self.failures.pop(str(directory), None)
        log.info("serving %s version %s on %s", name, version, served.runtime.device)
        return served

    def _proved(self, directory: Path) -> Served:
        """A version that has reproduced its golden.npz, as fast as it goes here."""
        runtime = Runtime(directory, device=self._device, threads=self._threads)
        name, version = runtime.manifest.name, runtime.manifest.version
        if (name, version) != (directory.parent.name, int(directory.name)):
            raise ManifestError(f"{directory}: manifest.json is of {name}/{version}")
        served = Served(runtime, runtime.prove())
        runtime.quicken()
        if runtime.device == "cuda" and self._resident_bytes:
            runtime.reside(self._resident_bytes)
        return served

    def names(self) -> list[str]:
        """Models with at least one served version, sorted."""
        return sorted(self._served)

    def versions(self, name: str) -> list[int]:
        """Served versions of a model, ascending.

        Raises:
            ModelNotFound: none is served.
        """
        return sorted(self._of(name))

    def mixed(self, name: str) -> bool:
        """Whether served versions of a model take different numbers of features."""
        return name in self._mixed

    def renamed(self, name: str) -> bool:
        """Whether served versions of a model differ in the names of features or outputs, or in their order."""
        return name in self._renamed

    def live(self, name: str) -> Served:
        """The highest served version.

        Raises:
            ModelNotFound: none is served.
        """
        live = self._live.get(name)
        if live is None:
            raise self._not_served(name)
        return live

    def get(self, name: str, version: int) -> Served | None:
        """One served version, None if it is not served."""
        return self._served.get(name, {}).get(version)

    def require(self, name: str, version: int) -> Served:
        """One served version.

        Raises:
            ModelNotFound: it is not served.
        """
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
        if not self._served[name]:
            del self._served[name]
        self._look(name)

    def _of(self, name: str) -> dict[int, Served]:
        versions = self._served.get(name)
        if not versions:
            raise self._not_served(name)
        return versions

    def _not_served(self, name: str) -> ModelNotFound:
        return ModelNotFound(f"model {name!r} is not served, there are {self.names()}", model=name)


def _stamp(directory: Path) -> Stamp:
    stamp: Stamp = []
    for name in (MODEL_FILE, MANIFEST_FILE, GOLDEN_FILE):
        try:
            found = (directory / name).stat()
            stamp.append((found.st_mtime_ns, found.st_size, found.st_ino))
        except OSError:
            stamp.append(None)
    return stamp
