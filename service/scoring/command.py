"""score: step a table of any size through a model, without a server."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack

from stepcast import progress
from stepcast.arguments import nearest
from stepcast.errors import ConfigError, ManifestError, ModelNotFound, SessionBusy, VersionFailed
from stepcast.rooms import example_models
from stepcast.tables import is_parquet

from ..engine.repository import Repository, Served
from ..settings import PREFIX, Settings
from .files import listed
from .layout import Wanted
from .work import Plan, Work

_OF_SETTINGS = ("models", "store", "device", "threads")


def run(asked: argparse.Namespace) -> int:
    """Run the command; its exit status.

    Raises:
        ConfigError, ManifestError, StepcastError: one line says why.
    """
    given = {name: getattr(asked, name) for name in _OF_SETTINGS}
    if asked.example:
        given["models"] = str(example_models())
    if asked.threads is None and f"{PREFIX}THREADS" not in os.environ:
        given["threads"] = str(_processors())
    settings = Settings.read(os.environ, **given)
    plan = _plan(asked)
    served = _served(settings, asked.model, asked.version)
    work = Work(plan, served, settings)
    for name in work.layout.absent:
        print(f"no column for {name!r}: a missing reading in every row", file=sys.stderr)
    with ExitStack() as stack:
        tell: Callable[[int, int | None], None] = lambda done, total: None  # noqa: E731
        if sys.stderr.isatty():
            tell = stack.enter_context(progress.bar("rows", None))
        try:
            result = work.run(tell)
        except OSError as error:  # a full disk, say
            raise ConfigError(f"{error.filename or plan.out}: {error.strerror or error}") from error
    for text in result.told:
        print(f"left out: {text}", file=sys.stderr)
    if result.skipped:
        print(f"{result.skipped} of {result.rows} rows were left out", file=sys.stderr)
    if result.kept:
        told = listed([repr(key) for key in result.kept])
        text = f"{len(result.kept)} sessions were changed in the store meanwhile, and stay as they are: {told}"
        raise SessionBusy(text)
    print(f"{result.rows} rows through {served.name} version {served.version}: {plan.out}")
    return 0


def _processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _served(settings: Settings, model: str, version: int | None) -> Served:
    """The version that is asked for, or that a server would take: the highest one that proves itself."""
    repository = Repository(
        settings.models, device=settings.device, threads=settings.threads, batch_rows=settings.batch_rows
    )
    if not settings.models.is_dir():
        raise ManifestError(f"model repository {str(settings.models)!r} is not a directory")
    if version is not None:
        return repository.load(model, version)
    folders = [path.name for path in (settings.models / model).glob("*") if path.name.isdigit()]
    if not folders or "/" in model:
        known = sorted(path.name for path in settings.models.iterdir() if path.is_dir())
        raise ModelNotFound(f"{str(settings.models)!r} has no model {model!r}.{nearest(model, known)}", model=model)
    for number in sorted(map(int, folders), reverse=True):
        try:
            return repository.load(model, number)
        except VersionFailed as error:
            failed = error
            print(error, file=sys.stderr)
    raise failed


def _plan(asked: argparse.Namespace) -> Plan:
    if not is_parquet(asked.out) and asked.out.suffix.lower() != ".csv":
        raise ConfigError(f"--out {asked.out}: want a file called .csv, .parquet or .pq")
    if asked.data.is_dir() and asked.data.resolve() in asked.out.resolve().parents:
        raise ConfigError(f"--out {asked.out} lies among the tables of {asked.data}. Write it elsewhere.")
    if asked.out.resolve() == asked.data.resolve():
        raise ConfigError(f"--out {asked.out} is the table itself. Write it elsewhere.")
    if asked.goes_on and asked.store is None:
        raise ConfigError("--continue goes on from the sessions of a store. Name it: --store URL")
    if asked.store is not None and asked.store.startswith("memory:"):
        raise ConfigError("--store memory:// ends with this command, and no server can go on from there. Take another.")
    pairs = [text.partition("=") for text in asked.column]
    if wrong := [name for name, _, column in pairs if not (name and column)]:
        raise ConfigError(f"--column {wrong[0]!r}: want FEATURE=COLUMN")
    wanted = Wanted(
        key=asked.key,
        time=asked.time,
        mask=asked.mask,
        renamed={name: column for name, _, column in pairs},
        keep=tuple(asked.keep),
        known_in_row=asked.known_in_row,
    )
    return Plan(
        data=asked.data,
        out=asked.out,
        wanted=wanted,
        session=asked.session,
        namespace=asked.namespace,
        prefix=asked.prefix,
        any_time=asked.any_time,
        store=asked.store is not None,
        goes_on=asked.goes_on,
        force=asked.force,
        skip=asked.skip_bad_rows,
        chunk_rows=asked.chunk_rows,
        state_bytes=round(asked.state_mb * 1e6),
        checkpoint_s=asked.checkpoint_s,
    )
