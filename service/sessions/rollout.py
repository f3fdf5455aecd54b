"""Running free: a forecast of H steps by feeding predictions back, a sequence of sampled classes, or sample paths.

The first step's fed inputs come from the session's last kept answer, each later one's from the step before. What the
caller knows of the future (a calendar, a planned set point) it gives as inputs; where it gives a number for a fed
feature too, its number wins.
"""

import asyncio
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from secrets import randbits
from typing import Any

import numpy as np
import numpy.typing as npt

from stepcast.errors import InvalidRequest, NoFeedback, ShapeMismatch, StepConflict, TooLarge
from stepcast.manifest import Manifest

from ..engine import arrays
from ..engine.arrays import Floats
from ..engine.repository import Served
from ..records.digest import legacy_named
from ..records.record import Record, encode_answer
from .core import Address
from .edits import States
from .fan import Fan
from .stored import Edit

Known = Callable[[Manifest], Awaitable[Floats]]
"""Reads what is known of the future by the names of the version that rolls out."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rollout is asked to do."""

    steps: int  # H
    inputs: Floats | Known | None = None  # what is known of the future, (H, F) or (N, H, F), NaN where nothing is
    commit: bool = False  # whether the session is there afterwards
    seq: int | None = None  # the number that its last step shall have; only with `commit`
    temperature: float = 0.0  # 0: the likeliest class; else one is drawn from p^(1/temperature)
    seed: int | None = None  # of the draws; None: one of its own
    paths: int = 0  # sample paths for each example
    levels: tuple[float, ...] = ()  # of the quantiles of the paths
    keep_paths: bool = False  # whether the paths themselves are answered, too


async def rollout(states: States, address: Address, plan: Plan) -> dict[str, Any]:
    """Run a session free.

    Raises:
        NoFeedback: nothing is fed back and inputs do not cover all steps, or there is no last answer to start from.
        StepConflict: `seq` is not the number that the last step would have.
        SessionNotFound, ShapeMismatch, NonFinite, TooLarge.
    """
    if plan.steps > states.settings.steps_limit:
        raise TooLarge(f"{plan.steps} steps in one rollout (limit {states.settings.steps_limit})")
    if plan.seq is not None and not plan.commit:
        raise InvalidRequest("$.seq belongs to a rollout with commit")
    if plan.seq is not None and plan.temperature and plan.seed is None:
        raise InvalidRequest("a rollout with seq and temperature needs a $.seed, so that a retry draws the same")
    if plan.commit and plan.paths:
        raise InvalidRequest("a rollout of sample paths cannot be committed: a session has one state")
    if not plan.paths and (plan.levels or plan.keep_paths):
        raise InvalidRequest("$.levels and $.keep_paths belong to a rollout with paths")
    seed = randbits(63) if plan.seed is None else plan.seed
    answer: dict[str, Any] = {}

    async def edit(found: Record | None) -> Edit | None:
        view = states.viewed(address, states.ledger.there(address, found))
        record, served = view.record, view.served
        fan = Fan(served.manifest, plan.paths, plan.levels) if plan.paths else None
        known = await _known(plan, served.manifest, max(1, record.examples), states.settings.body_limit_bytes)
        payload = _payload(plan, known)
        digest = states.sessions.digests.named(b"rollout", *payload)
        outputs, step, edited = _stored(record, plan, digest, payload, address), plan.seq, None
        if outputs is None:
            feed = _Feed(served.manifest, plan.temperature, seed, fan)
            outputs, state = await _run(states, record, served, known, feed)
            step = record.step
            if plan.commit:
                step += plan.steps
                kept = encode_answer(digest, plan.steps, outputs.shape[2], outputs.tobytes())
                edited = Edit(record.advanced(plan.steps, len(known), state, kept, states.ledger.clock()))
        answer.update(outputs=outputs, step=step, version=record.version)
        if fan is not None:
            answer.update(await asyncio.to_thread(fan.answer, plan.keep_paths))
        if served.manifest.classes is not None:
            answer["classes"] = _Feed(served.manifest, plan.temperature, seed).names(outputs)
        return edited

    states.repository.live(address.model)
    await states.ledger.change(address, edit)
    return answer


async def _run(states: States, record: Record, served: Served, known: Floats, feed: "_Feed") -> tuple[Floats, bytes]:
    """Outputs (N, H, O), and the state after them."""
    state = record.state if record.examples else served.runtime.initial(len(known))
    last, outputs = _last_outputs(record, len(known)), []
    copies = 1
    if feed.fan is not None:
        state, copies = feed.fan.states(state, len(known)), feed.fan.copies
        known, last = feed.fan.rows(known), None if last is None else feed.fan.rows(last)
    for step in range(known.shape[1]):
        x = feed.inputs(known[:, step], last, step)
        call = await states.sessions.run(served, x[:, None], None, state)
        last, state = call.reply()[:, 0], call.state
        outputs.append(last[::copies])
        feed.take(last)
    return np.stack(outputs, axis=1), state


class _Feed:
    """Turns the last outputs into the fed part of the next inputs."""

    def __init__(self, manifest: Manifest, temperature: float, seed: int, fan: Fan | None = None) -> None:
        self.manifest, self.classes, self.fan, self._temperature = manifest, manifest.classes, fan, temperature
        # what the first inputs take is drawn from a stream of its own, so that a kept answer's draws can be made again
        first, later = np.random.SeedSequence(seed).spawn(2)
        self._first, self._random = np.random.default_rng(first), np.random.default_rng(later)
        self._chosen: npt.NDArray[np.int64] | None = None
        self._values: Floats | None = None
        self._names = [o.name for o in manifest.outputs]
        self._slices = manifest.feature_slices()

    def inputs(self, known: Floats, last: Floats | None, step: int) -> Floats:
        """Inputs (N, F): what is known, and the feedback where it is not."""
        x = known.copy()
        for link in self.manifest.feedback:
            cut = self._slices[link.feature]
            absent = np.isnan(x[:, cut]).all(axis=1)
            if not absent.any():
                continue
            if last is None or np.isnan(last[absent]).any():
                text = f"there is no last answer to feed {link.feature!r} at step {step}"
                advice = "Step the session first, or give the first step's inputs."
                raise NoFeedback(f"{text}. {advice}", feature=link.feature)
            x[absent, cut] = self._fed(link.source, last, cut.stop - cut.start)[absent]
        if not self.manifest.feedback and np.isnan(x).all():
            raise NoFeedback(f"model {self.manifest.name!r} feeds no output back. Give inputs for every step.")
        arrays.check_readings(x[:, None], self.manifest)
        return x

    def _fed(self, source: str, last: Floats, width: int) -> Floats:
        if self.fan is not None and source in self.fan.predictive.targets:
            if self._values is None:
                self._values = self.fan.values(last, self._first)
            return np.repeat(self._values[:, self.fan.predictive.targets.index(source), None], width, axis=1)
        if source != "class":
            return np.repeat(last[:, self._names.index(source), None], width, axis=1)
        chosen = self._draw(last, self._first) if self._chosen is None else self._chosen
        if width == 1:
            return chosen[:, None].astype(np.float32)
        return np.eye(width, dtype=np.float32)[chosen]

    def take(self, last: Floats) -> None:
        """Draw what the next inputs are fed from the last outputs, and what the paths say at this step."""
        if self.classes is not None:
            self.choose(last)
        if self.fan is not None:
            self._values = self.fan.values(last, self._random)
            self.fan.keep(self._values)

    def choose(self, probabilities: Floats) -> npt.NDArray[np.int64]:
        """One class per row: the likeliest at temperature 0, else drawn from p^(1/temperature)."""
        self._chosen = self._draw(probabilities, self._random)
        return self._chosen

    def names(self, outputs: Floats) -> list[list[str]]:
        """The class of each step (N, H) of a rollout with these outputs (N, H, O); of a feed that chose nothing yet."""
        chosen = [self.choose(outputs[:, step]) for step in range(outputs.shape[1])]
        return [[(self.classes or ())[row] for row in rows] for rows in np.stack(chosen, axis=1)]

    def _draw(self, probabilities: Floats, random: np.random.Generator) -> npt.NDArray[np.int64]:
        if self._temperature == 0:
            return np.asarray(probabilities.argmax(axis=1), np.int64)
        logits = np.log(np.maximum(probabilities.astype(np.float64), 1e-30)) / self._temperature
        weights = np.exp(logits - logits.max(axis=1, keepdims=True)).cumsum(axis=1)
        draws = random.random((len(weights), 1)) * weights[:, -1:]
        return np.asarray((weights < draws).sum(axis=1), np.int64)


async def _known(plan: Plan, manifest: Manifest, rows: int, limit_bytes: int) -> Floats:
    """What is known of the future, (N, H, F), NaN where nothing is; TooLarge where it or the answer would not fit."""
    want = (rows, plan.steps, manifest.n_features)
    size = 4 * rows * (1 + plan.paths) * plan.steps * max(manifest.n_features, manifest.n_outputs)
    size = max(size, rows * plan.paths * manifest.state_row_bytes)
    if size > limit_bytes:
        what = f"{rows} examples by {plan.steps} steps" + (f" on {plan.paths} paths each" if plan.paths else "")
        raise TooLarge(f"a rollout of {what} takes {size} bytes (limit {limit_bytes})")
    given = await plan.inputs(manifest) if callable(plan.inputs) else plan.inputs
    if given is None:
        given = np.full(want, np.nan, np.float32)
    if given.shape not in (want, want[1:]):
        got = list(given.shape)
        raise ShapeMismatch(f"$.inputs has shape {got}, want {list(want[1:])} or {list(want)}", got=got)
    known = np.broadcast_to(given, want)
    arrays.check_infinite(known)
    arrays.check_known(known, manifest)
    return arrays.canonical(known)


def _last_outputs(record: Record, rows: int) -> Floats | None:
    """Each row's last kept output (N, O), NaN where all were masked; None where no answer is kept."""
    last: Floats | None = None
    for answer in record.kept():
        y = np.frombuffer(answer.outputs, np.float32).reshape(rows, answer.steps, -1)
        if last is None:
            last = y[:, -1].copy()
        if y.shape[2] != last.shape[1]:  # of another model version
            break
        for t in range(answer.steps - 1, -1, -1):
            masked = np.isnan(last).any(axis=1)
            if not masked.any():
                return last
            last[masked] = y[masked, t]
    return last


def _payload(plan: Plan, known: Floats) -> tuple[bytes, bytes]:
    """What tells one rollout from another."""
    head = struct.pack("<Qdq", plan.steps, plan.temperature, -1 if plan.seed is None else plan.seed)
    return head, known.tobytes()


def _stored(record: Record, plan: Plan, digest: bytes, payload: tuple[bytes, bytes], address: Address) -> Floats | None:
    """The kept outputs of the same committed rollout; None where it is to be run."""
    expected = record.step + plan.steps
    if plan.seq in (None, expected):
        return None
    kept = record.answer(plan.seq or 0)
    if kept is not None and kept.legacy:
        digest = legacy_named(b"rollout", *payload)
    if kept is None or not kept.digest.startswith(digest):
        text = f"session {address.session!r} is at step {record.step}, got seq {plan.seq} for a rollout of {plan.steps}"
        facts = {"session": address.session, "step": record.step, "seq": plan.seq, "expected_seq": expected}
        raise StepConflict(f"{text} steps. Send seq {expected}.", **facts)
    return np.frombuffer(kept.outputs, np.float32).reshape(max(1, record.examples), kept.steps, -1)
