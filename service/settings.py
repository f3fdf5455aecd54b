"""Every knob of the server, once: name with unit, default, help. Read once at start, frozen afterwards.

A setting `queue_limit` is the variable STEPCAST_QUEUE_LIMIT. An unknown STEPCAST_ variable stops the start and names
the nearest known one: refusing to start is better than starting wrong.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from stepcast.arguments import CLIENT_VARIABLES
from stepcast.errors import ConfigError

PREFIX = "STEPCAST_"
T = TypeVar("T")


def _of(default: T, meaning: str, **bounds: Any) -> T:
    """A setting; `bounds` are pydantic's ge, gt, le."""
    made: T = Field(default, description=meaning, **bounds)
    return made


class Settings(BaseModel):
    """The server's configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Path = _of(Path("models"), "Model repository: <models>/<name>/<version>/.")
    store: str = _of(
        "sqlite:///stepcast.db",
        "Where sessions rest: sqlite:///FILE, redis://, rediss://, redis+sentinel://, redis+cluster:// "
        "or memory:// (volatile).",
    )
    durability: Literal["commit", "replicated", "interval"] = _of(
        "commit",
        "When a step is acknowledged: after the store has it (commit), after replicas have it too "
        "(replicated), or before it is written (interval: at most flush_interval_s of steps can be lost).",
    )
    replicas: int = _of(1, "Replicas that must have a step at durability 'replicated'.", ge=1)
    flush_interval_s: float = _of(0.2, "Longest time unwritten at durability 'interval'.", gt=0)
    store_timeout_s: float = _of(2.0, "Longest wait for the store before 503.", gt=0)
    ttl_s: int = _of(0, "Seconds after its last use at which a session is forgotten; 0: never.", ge=0)

    host: str = _of("127.0.0.1", "Address to listen on.")
    port: int = _of(8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    workers: int = _of(1, "Server processes; they share nothing but the store.", ge=1)
    device: Literal["auto", "cpu", "cuda"] = _of("auto", "Where models run; auto takes CUDA when it is there.")
    threads: int = _of(1, "onnxruntime's threads within one operator.", ge=1)
    resident_bytes: int = _of(
        2**30,
        "GPU memory per model version and worker for states that stay there between steps, bytes; 0: none. "
        "Without CUDA it means nothing.",
        ge=0,
    )

    batch_rows: int = _of(256, "Most rows (examples) in one run.", ge=1)
    chunk_s: float = _of(
        0.002, "About how long one chunk of a long sequence may run; an eighth of it while single steps come.", gt=0
    )
    inline_s: float = _of(0.003, "Runs expected to be shorter are made on the event loop, others in a thread.", ge=0)
    queue_limit: int = _of(8192, "Steps waiting per model before 429.", ge=1)
    session_queue_limit: int = _of(256, "Steps waiting per session before 429.", ge=1)
    deadline_s: float = _of(5.0, "Longest time a step may wait for its run before 504.", gt=0)
    hot_bytes: int = _of(2**28, "Memory for sessions kept ready in the process, bytes; the rest is read again.", ge=0)
    digest_key: str = _of(
        "",
        "Secret by which payloads are named to know a retry; the same for all servers of a store, now and "
        "later; empty: a fixed one.",
    )

    body_limit_bytes: int = _of(8 * 2**20, "Largest request body or WebSocket frame.", ge=1024)
    steps_limit: int = _of(100_000, "Most time steps in one call.", ge=1)
    examples_limit: int = _of(65_536, "Most examples in one session.", ge=1)
    session_limit_bytes: int = _of(
        2**23, "Largest session; each of its checkpoints counts as much as it does itself, bytes.", ge=1024
    )
    tenant_sessions_limit: int = _of(0, "Most sessions of one namespace; 0: any number.", ge=0)
    tenant_limit_bytes: int = _of(0, "Most bytes of one namespace's sessions, without checkpoints; 0: any.", ge=0)
    checkpoints_limit: int = _of(64, "Most checkpoints per session.", ge=0)
    frames_limit: int = _of(256, "WebSocket frames in flight per socket before it is not read.", ge=1)
    stall_s: float = _of(30.0, "Longest time a client may leave answers unread before it is cut off.", gt=0)
    head_limit_bytes: int = _of(2**16, "Largest request line with headers, before 414 or 431.", ge=4096)
    read_s: float = _of(
        20.0,
        "Longest time for the head of a request to come whole, before 408; its body has as long, and a second more for "
        "each 16 KiB of it that came.",
        gt=0,
    )
    connections_limit: int = _of(16_384, "Open connections per process before 503.", ge=1)
    intake_bytes: int = _of(2**28, "Bytes of requests in flight per process before 429.", ge=2**20)
    tenant_intake_bytes: int = _of(2**27, "The same for one namespace; without keys there is one.", ge=2**20)
    log_steps: int = _of(0, "Inputs kept per session for version policy 'replay'; 0: none are kept.", ge=0)
    version_policy: Literal["pin", "reset", "replay"] = _of(
        "pin",
        "A session whose model version is no longer served: refused (pin), starts from the initial state "
        "(reset), or is rebuilt from its kept inputs (replay).",
    )

    api_keys: str = _of("", "Keys as ROLE:NAMESPACE:KEY separated by commas, roles read, step, admin; empty: no keys.")
    api_keys_file: str = _of(
        "",
        "File of keys, a line each, as `stepcast key` prints it: NAME ROLE NAMESPACE sha256:HEX; read again when it "
        "changes. With a file every call needs a key.",
    )
    tries_limit: int = _of(20, "Wrong keys per address before 429; all come back within a minute. 0: any number.", ge=0)
    hosts: str = _of(
        "",
        "Names that clients may call the server by, separated by commas; .example.org: all below it, *: every name. "
        "Empty: every name if keys are needed, else names without a dot or of reserved endings. IP addresses and "
        "localhost always hold.",
    )
    cors_origins: str = _of("", "Origins allowed to call from a browser, separated by commas.")
    docs: bool = _of(True, "Serve /docs, /redoc, /openapi.json and /asyncapi.json.")
    drain_s: float = _of(20.0, "Longest time for accepted steps after SIGTERM.", ge=0)
    repository_poll_s: float = _of(2.0, "How often new versions are looked for; 0: never.", ge=0)
    log_level: Literal["debug", "info", "warning", "error"] = _of("info", "Least severe log line.")

    @classmethod
    def read(cls, environ: Mapping[str, str], **overrides: Any) -> Self:
        """Settings from STEPCAST_ variables, or ConfigError; `overrides` (the command line) win unless None."""
        names = {PREFIX + name.upper(): name for name in cls.model_fields}
        values: dict[str, Any] = {}
        for variable, value in environ.items():
            if not variable.startswith(PREFIX) or variable in CLIENT_VARIABLES:
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
    bounds = [f"{sign} {getattr(at, key)}" for at in field.metadata for key, sign in signs.items() if hasattr(at, key)]
    return ", ".join([words[field.annotation or str], *bounds])
