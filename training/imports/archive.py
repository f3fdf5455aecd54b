"""A zip that another framework saved: only the entries that are known, read into memory, each within a limit.

Nothing is unpacked to disk.
"""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Final, Self

from stepcast.errors import ManifestError

MOST_ENTRIES: Final = 10_000
_ENCRYPTED: Final = 0x1


class Archive:
    """An open zip; use it as a context.

    Args:
        file: The zip.
        framework: Whose it is; errors name it.
        entries: What may be read; the first must be there.

    Raises:
        ManifestError: not a zip, or one whose table of contents cannot be trusted.
    """

    def __init__(self, file: Path, framework: str, entries: Sequence[str]) -> None:
        self.file, self._framework, self._entries = file, framework, entries
        with self._readable():
            self._zip = zipfile.ZipFile(file)
        try:
            self._sizes = self._checked()
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._zip.close()

    def size(self, entry: str) -> int | None:
        """Bytes that an entry declares; None if it is not there."""
        return self._sizes.get(entry)

    def read(self, entry: str, limit: int) -> bytes:
        """An entry's content, which must be there and not be longer than `limit` bytes.

        Raises:
            ManifestError: it is longer, or damaged.
        """
        declared = self._sizes[entry]
        if declared > limit:
            raise ManifestError(f"{self.file}: {entry} declares {declared} bytes, at most {limit} are read")
        with self._readable(), self._zip.open(entry) as stream:
            content = stream.read(limit + 1)  # what is declared limits what is inflated
        if len(content) != declared:
            raise ManifestError(f"{self.file}: {entry} has {len(content)} bytes and declares {declared}")
        return content

    def _checked(self) -> dict[str, int]:
        """Declared sizes of the known entries.

        Raises:
            ManifestError: a name that leaves the archive, an entry that is there twice or encrypted, or the
                first of those that are known is not there.
        """
        entries = self._zip.infolist()
        if len(entries) > MOST_ENTRIES:
            raise ManifestError(f"{self.file}: has {len(entries)} entries, at most {MOST_ENTRIES} are read")
        sizes: dict[str, int] = {}
        for entry in entries:
            path = PurePosixPath(entry.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts:
                raise ManifestError(f"{self.file}: entry {entry.filename!r} leads out of the archive. Do not trust it.")
            if entry.filename in sizes:
                raise ManifestError(f"{self.file}: entry {entry.filename!r} is there twice")
            if entry.filename not in self._entries:
                continue
            if entry.flag_bits & _ENCRYPTED:
                raise ManifestError(f"{self.file}: {entry.filename} is encrypted")
            sizes[entry.filename] = entry.file_size
        if self._entries[0] not in sizes:
            said = f"has no {self._entries[0]}, so it is no saved network of {self._framework}"
            raise ManifestError(f"{self.file}: {said}")
        return sizes

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """zipfile's and zlib's errors become ours."""
        try:
            yield
        except OSError as error:
            raise ManifestError(f"{self.file}: cannot be read ({error.strerror or error})") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise ManifestError(f"{self.file}: is no zip, or a damaged one ({error})") from error
