"""One class per layer kind: how it runs, what state it carries, and how it is written in ONNX."""

from .base import Layer
from .feedforward import Dense, Dropout
from .recurrent import GravesLstm, Gru, Lstm, SimpleRnn
from .specs import DenseSpec, DropoutSpec, GravesLstmSpec, GruSpec, LstmSpec, SimpleRnnSpec
from .stack import Placed


def build(placed: Placed) -> Layer:
    """The layer of a placed specification, with fresh weights."""
    name, spec, shape = placed.name, placed.spec, placed.shape
    size = shape.size or 0
    match spec:
        case SimpleRnnSpec():
            return SimpleRnn(name, spec, size)
        case LstmSpec():
            return Lstm(name, spec, size)
        case GravesLstmSpec():
            return GravesLstm(name, spec, size)
        case GruSpec():
            return Gru(name, spec, size)
        case DenseSpec():
            return Dense(name, spec, size)
        case DropoutSpec():
            return Dropout(name, spec)
    raise AssertionError(f"no layer for {spec!r}")
