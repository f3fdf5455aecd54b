"""Inference requests of the Open Inference Protocol as steps of sessions; the same for its doors.

A request of a sequence is a step of its session. One that starts it goes from the initial state, whatever the session
had; one that ends it leaves a mark in its place (sessions/sequences.py). A request of no sequence is a pass from the
initial state, of which nothing is kept.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Protocol

import msgspec
import numpy as np

from stepcast.errors import InvalidRequest, ModelNotFound, SessionNotFound

from ...engine.arrays import Form, Mask
from ...engine.repository import Served
from ...sessions.core import Answers, Floats
from ...sessions.sequences import Sequences
from ..large import LARGE_BYTES, aside
from ..names import Naming
from ..steps import Steps, Way
from .requests import NO_FLAGS, Request, StepInputs, Wish, flags_of, read_inputs, served_of
from .statistics import Statistics
from .tensors import FP32, Output, bytes_output


class Inferred(msgspec.Struct, gc=False):
    """The answer to a request."""

    model: str
    version: int
    outputs: list[Output]
    step: int | None  # the sequence's number of steps now; None: the request is of no sequence
    id: str = ""

    @property
    def parameters(self) -> dict[str, int]:
        """Those of the response."""
        return {} if self.step is None else {"stepcast_step": self.step}


class Reply(Protocol):
    """Who asked: a door. It hears of one of the two, maybe before `Inference.take` returns."""

    def inferred(self, answer: Inferred) -> None:
        """The request has its answer."""

    def failed(self, error: BaseException) -> None:
        """It was refused, or it is unknown whether it was applied."""

    def gone(self) -> bool:
        """Whether nobody waits any more; a step that has not begun is dropped then."""


class Inference:
    """Takes the requests of all doors of the protocol."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.turns, self.repository = steps, steps.turns, steps.repository
        self.sequences = Sequences(steps.turns)
        self.statistics = Statistics()
        self._outputs: dict[tuple[str, int], str] = {}

    def take(self, way: Way, request: Request, reply: Reply, came: float | None = None) -> None:
        """Take a request of a tenant's model, which came then (monotonic). All that comes of it, the reply hears."""
        asking = Asking(self, way, request, reply, perf_counter() if came is None else came)
        try:
            flags = request.flags or flags_of(request.parameters)
            asking.flags = flags
            on = served_of(self.repository, way.model, request.version) if request.version else None
            if not flags.session:
                self.steps.later(self._pass(asking, on or self.steps.look(way).served))
            elif not self._join(asking, on):
                self._queue_by(asking, on)
        except Exception as error:
            asking.fail(error)

    def output_of(self, model: str, version: int) -> str:
        """The name of the tensor that holds all outputs of a version, though it may be served no more."""
        name = self._outputs.get((model, version))
        if name is None:
            served = self.repository.get(model, version) or self.repository.live(model)
            name = self._outputs[model, version] = served.manifest.output.name
        return name

    async def infer(self, way: Way, request: Request) -> Inferred:
        """The answer to a request; raises what it is refused with. One that is cancelled before its run is dropped."""
        pending = Pending()
        self.take(way, request, pending)
        return await pending.future

    def _join(self, asking: "Asking", on: Served | None) -> bool:
        """Let a plain step join a batch; False: it goes the general way."""
        request, flags, way = asking.request, asking.flags, asking.way
        reader = self.steps.look(way)
        served, first = reader.served, request.inputs[0] if len(request.inputs) == 1 else None
        if first is None or first.raw is None or first.datatype != FP32 or first.name != served.manifest.input.name:
            return False
        if on is not None or flags.start or flags.within_s is not None:
            return False
        plain = reader.raw(first.raw, first.shape)
        if plain is None:
            return False
        if request.outputs:
            _check_wishes(request.outputs, self.steps.names(way.model).of(served), served)
        asking.data, asking.form = plain
        asking.handed = perf_counter()
        return self.turns.join(way.prefix + flags.session, plain[0], flags.seq, asking)

    def _queue_by(self, asking: "Asking", on: Served | None) -> None:
        """Queue a step of any kind, checked against the version that is to take it."""
        way, size = asking.way, asking.request.bytes
        one = on is not None or asking.flags.start or len(self.repository.versions(way.model)) == 1
        if one and size <= LARGE_BYTES:
            self._hand(asking, self._read(asking, on or self.steps.look(way).served), on)
        else:
            self.steps.later(self._queue_own(asking, on, one))

    async def _queue_own(self, asking: "Asking", on: Served | None, one: bool) -> None:
        """Queue a step that is large, or that the session's own version is to take; `one`: there is none to choose."""
        way, size = asking.way, asking.request.bytes
        try:
            if one:
                read = await aside(size, self._read, asking, on or self.steps.look(way).served)
            else:
                whole = self.steps.look(way).served.manifest.input.name
                named = all(tensor.name != whole for tensor in asking.request.inputs)
                session = asking.flags.session
                read = await self.steps.by_own(way, session, named, lambda s: aside(size, self._read, asking, s))
            self._hand(asking, read, on)
        except Exception as error:
            asking.refused(error)

    def _read(self, asking: "Asking", served: Served) -> StepInputs:
        """A request's inputs, checked against a version; its outputs too."""
        naming = self.steps.names(asking.way.model).of(served)
        read = read_inputs(asking.request.inputs, served, naming, self.steps.limits)
        _check_wishes(asking.request.outputs, naming, served)
        return read

    def _hand(self, asking: "Asking", read: StepInputs, on: Served | None) -> None:
        """Queue a step whose inputs were read; raises what it is refused with."""
        flags, address = asking.flags, asking.way.address(asking.flags.session)
        asking.x, asking.mask, asking.form, asking.data = read.x, read.mask, read.form, None
        asking.handed = perf_counter()
        step = partial(self.turns.step, starts=flags.start, on=on, within_s=flags.within_s)
        step(address, read.x, read.mask, flags.seq, asking, None, read.named)

    async def _pass(self, asking: "Asking", served: Served) -> None:
        """Answer a request of no sequence."""
        try:
            read = await aside(asking.request.bytes, self._read, asking, served)
            asking.form, asking.handed = read.form, perf_counter()
            run = await self.turns.run(served, read.x, read.mask, served.runtime.initial(len(read.x)))
            answers = Answers(run.reply()[None], served.version, ended=perf_counter())
            asking.answer(answers, 0, None)
        except Exception as error:
            asking.fail(error)


class Asking:
    """A request on its way; the waiter of its step."""

    __slots__ = ("came", "data", "flags", "form", "handed", "inference", "mask", "reply", "request", "way", "x")

    creates = False

    def __init__(self, inference: Inference, way: Way, request: Request, reply: Reply, came: float) -> None:
        self.inference, self.way, self.request, self.reply = inference, way, request, reply
        self.came = self.handed = came  # and was handed to the sessions, monotonic
        self.flags = NO_FLAGS
        self.form: Form = "NF"
        self.data: bytes | None = None  # the inputs (N, F) of a plain step; else
        self.x: Floats | None = None  # (N, T, F),
        self.mask: Mask | None = None  # (N, T)

    def done(self) -> bool:
        """Whether nobody waits for it."""
        return self.reply.gone()

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        """The step was made."""
        if self.flags.end:
            self.inference.steps.later(self._end(answers, row, step))
        elif self.flags.start and self.inference.turns.settings.ttl_s:
            self.inference.steps.later(self._start(answers, row, step))
        else:
            self.answer(answers, row, step)

    def refused(self, error: BaseException) -> None:
        """The step was not made, or that is unknown."""
        if isinstance(error, SessionNotFound) and not self.flags.start:
            self.inference.steps.later(self._miss())
        else:
            self.fail(error)

    def answer(self, answers: Answers, row: int, step: int | None) -> None:
        """Give the answer to who asked."""
        try:
            inference, way, request, outputs = self.inference, self.way, self.request, answers.outputs
            _, n, t, o = outputs.shape
            data = answers.made.get(FP32)
            if data is None:
                data = answers.made[FP32] = outputs.tobytes()  # of all rows that wait
            size = 4 * n * t * o
            shape = (n, o) if self.form == "NF" else (n, t, o) if self.form == "NTF" else (o,)
            raw = data[row * size : row * size + size]
            whole = Output(inference.output_of(way.model, answers.version), FP32, shape, raw)
            said = [whole]
            if request.outputs:
                naming = inference.steps.names(way.model).behind(answers.version, o, step or 0)
                said = [_wished(wish, whole, naming) for wish in request.outputs]
            inference.statistics.of(way.model, answers.version).answered(self.came, self.handed, answers, n * t)
            self.reply.inferred(Inferred(way.model, answers.version, said, step, request.id))
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Tell who asked that there is none."""
        with suppress(ModelNotFound):
            live = self.inference.repository.live(self.way.model)
            self.inference.statistics.of(live.name, live.version).refused(self.came)
        self.reply.failed(error)

    async def _end(self, answers: Answers, row: int, step: int) -> None:
        try:
            await self.inference.sequences.end(self.way.address(self.flags.session), step)
            self.answer(answers, row, step)
        except Exception as error:
            self.fail(error)

    async def _start(self, answers: Answers, row: int, step: int) -> None:
        try:
            await self.inference.sequences.started(self.way.address(self.flags.session))
            self.answer(answers, row, step)
        except Exception as error:
            self.fail(error)

    async def _miss(self) -> None:
        """There is no such session: it may have ended with this very step."""
        try:
            x = self.x
            if x is None:
                features = self.inference.steps.look(self.way).served.n_features
                x = np.frombuffer(self.data or b"", np.float32).reshape(-1, 1, features)
            address, what = self.way.address(self.flags.session), f"sequence {self.flags.name!r}"
            answers, step = await self.inference.sequences.missing(address, what, self.flags.seq, x, self.mask)
            self.answer(answers, 0, step)
        except Exception as error:
            self.fail(error)


class Pending:
    """Waits in a coroutine."""

    def __init__(self) -> None:
        self.future: asyncio.Future[Inferred] = asyncio.get_running_loop().create_future()

    def inferred(self, answer: Inferred) -> None:
        if not self.future.done():
            self.future.set_result(answer)

    def failed(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def gone(self) -> bool:
        return self.future.done()


def _check_wishes(wishes: Sequence[Wish], naming: Naming, served: Served) -> None:
    """Raises InvalidRequest where an output is asked for that a version has not."""
    for wish in wishes:
        if wish.name != served.manifest.output.name and wish.name not in naming.names:
            told = ", ".join(map(repr, (served.manifest.output.name, *naming.names[:8])))
            told += ", ..." if naming.width > 8 else ""
            raise InvalidRequest(f"model {served.name!r} has no output {wish.name[:64]!r}, it has {told}")


def _wished(wish: Wish, whole: Output, naming: Naming) -> Output:
    """An output that was asked for: all in one tensor, one alone, or the best classes of either."""
    if wish.name == whole.name and not wish.classes:
        return whole
    alone = wish.name != whole.name
    names = (wish.name,) if alone else naming.names
    y = np.frombuffer(whole.raw, np.float32).reshape(whole.shape)
    if alone:
        y = y[..., [naming.names.index(wish.name)]]
    if not wish.classes:
        return Output(wish.name, FP32, y.shape, y.tobytes())
    best = np.argsort(-y, axis=-1, kind="stable")[..., : wish.classes]
    values = np.take_along_axis(y, best, axis=-1)
    said = [f"{v:f}:{i}:{names[i]}".encode() for v, i in zip(values.flat, best.ravel().tolist(), strict=True)]
    return bytes_output(wish.name, best.shape, said)
