"""Every knob of the server, once: name with unit, default, help. Read once at start, frozen afterwards.

A setting `queue_limit` is the variable STEPCAST_QUEUE_LIMIT. An unknown STEPCAST_ variable stops the start and names
the nearest known one: refusing to start is better than starting wrong.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from stepcast.errors import ConfigError

PREFIX = "STEPCAST_"


class Settings(BaseModel):
    """The server's configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Path = Field(Path("models"), description="Model repository: <models>/<name>/<version>/.")
    store: str = Field(
        "sqlite:///stepcast.db",
        description="Where sessions rest: sqlite:///FILE, redis://, rediss://, redis+sentinel://, redis+cluster:// "
        "or memory:// (volatile).",
    )
    durability: Literal["commit", "replicated", "interval"] = Field(
        "commit",
        description="When a step is acknowledged: after the store has it (commit), after replicas have it too "
        "(replicated), or before it is written (interval: at most flush_interval_s of steps can be lost).",
    )
    replicas: int = Field(1, ge=1, description="Replicas that must have a step at durability 'replicated'.")
    flush_interval_s: float = Field(0.2, gt=0, description="Longest time unwritten at durability 'interval'.")
    store_timeout_s: float = Field(2.0, gt=0, description="Longest wait for the store before 503.")
    ttl_s: int = Field(0, ge=0, description="Seconds after its last use at which a session is forgotten; 0: never.")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    workers: int = Field(1, ge=1, description="Server processes; they share nothing but the store.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where models run; auto takes CUDA when it is there."
    )
    threads: int = Field(1, ge=1, description="onnxruntime's threads within one operator.")
    resident_bytes: int = Field(
        2**30,
        ge=0,
        description="GPU memory per model version and worker for states that stay there between steps, bytes; 0: none. "
        "Without CUDA it means nothing.",
    )

    batch_rows: int = Field(256, ge=1, description="Most rows (examples) in one run.")
    chunk_s: float = Field(
        0.002,
        gt=0,
        description="About how long one chunk of a long sequence may run; an eighth of it while single steps come.",
    )
    inline_s: float = Field(
        0.003, ge=0, description="Runs expected to be shorter than this are made on the event loop, others in a thread."
    )
    queue_limit: int = Field(8192, ge=1, description="Steps waiting per model before 429.")
    session_queue_limit: int = Field(256, ge=1, description="Steps waiting per session before 429.")
    deadline_s: float = Field(5.0, gt=0, description="Longest time a step may wait for its run before 504.")
    hot_bytes: int = Field(
        256 * 2**20, ge=0, description="Memory for sessions kept ready in the process, bytes; the rest is read again."
    )

    digest_key: str = Field(
        "",
        description="Secret by which payloads are named to know a retry; the same for all servers of a store, now and "
        "later; empty: a fixed one.",
    )

    body_limit_bytes: int = Field(8 * 2**20, ge=1024, description="Largest request body or WebSocket frame.")
    steps_limit: int = Field(100_000, ge=1, description="Most time steps in one call.")
    examples_limit: int = Field(65_536, ge=1, description="Most examples in one session.")
    checkpoints_limit: int = Field(64, ge=0, description="Most checkpoints per session.")
    frames_limit: int = Field(256, ge=1, description="WebSocket frames in flight per socket before it is not read.")
    stall_s: float = Field(
        30.0, gt=0, description="Longest time a WebSocket client may leave its answers unread before it is cut off."
    )
    log_steps: int = Field(
        0, ge=0, description="Inputs kept per session for version policy 'replay'; 0: none are kept."
    )
    version_policy: Literal["pin", "reset", "replay"] = Field(
        "pin",
        description="A session whose model version is no longer served: refused (pin), starts from the initial state "
        "(reset), or is rebuilt from its kept inputs (replay).",
    )

    api_keys: str = Field(
        "", description="Keys as ROLE:NAMESPACE:KEY separated by commas, roles read, step, admin; empty: no keys."
    )
    api_keys_file: str = Field(
        "",
        description="File of keys, one per line: NAME ROLE NAMESPACE sha256:HEX, as `python -m service key` prints it; "
        "read again whenever it changes. With a file every call needs a key.",
    )
    cors_origins: str = Field("", description="Origins allowed to call from a browser, separated by commas.")
    docs: bool = Field(True, description="Serve /docs, /redoc, /openapi.json and /asyncapi.json.")
    drain_s: float = Field(20.0, ge=0, description="Longest time for accepted steps after SIGTERM.")
    repository_poll_s: float = Field(2.0, ge=0, description="How often new versions are looked for; 0: never.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line.")

    @classmethod
    def read(cls, environ: Mapping[str, str], **overrides: Any) -> Self:
        """Settings from STEPCAST_ variables; `overrides` (the command line) win where they are not None.

        Raises:
            ConfigError: an unknown variable, or a value that is none of what the setting takes.
        """
        names = {PREFIX + name.upper(): name for name in cls.model_fields}
        values: dict[str, Any] = {}
        for variable, value in environ.items():
            if not variable.startswith(PREFIX):
                continue
            if variable not in names:
                near = difflib.get_close_matches(variable, names, n=1, cutoff=0)
                raise ConfigError(f"unknown setting {variable!r}. The nearest is {near[0]!r}.")
            values[names[variable]] = value
        values.update({name: value for name, value in overrides.items() if value is not None})
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [f"{PREFIX}{str(e['loc'][0]).upper()}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
            raise ConfigError("; ".join(lines)) from error

    @classmethod
    def table(cls) -> str:
        """All settings as a table in Markdown: docs/settings.md holds it."""
        lines = ["| variable | default | takes | meaning |", "|---|---|---|---|"]
        for name, field in cls.model_fields.items():
            words = [PREFIX + name.upper(), str(field.default), _takes(field), field.description or ""]
            variable, default, takes, meaning = (word.replace("|", "\\|") for word in words)
            lines.append(f"| `{variable}` | {f'`{default}`' if default else 'empty'} | {takes} | {meaning} |")
        return "\n".join(lines) + "\n"


def _takes(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    words: dict[Any, str] = {int: "integer", float: "number", str: "text", Path: "path", bool: "`true`, `false`"}
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(part, key)}" for part in field.metadata for key, sign in signs.items() if hasattr(part, key)
    ]
    return ", ".join([words[field.annotation or str], *bounds])
