"""One class per layer kind: how it runs, what state it carries, and how it is written in ONNX."""

from .attention import Attention
from .base import Layer
from .cell_specs import (
    BidirectionalSpec,
    CellSpec,
    GravesLstmSpec,
    GruSpec,
    LstmSpec,
    MaskZeroSpec,
    MinGruSpec,
    RgLruSpec,
    SimpleRnnSpec,
    SlstmSpec,
)
from .cells import GravesLstm, Gru, Lstm, SimpleRnn, Slstm
from .convolution import Conv1D, Conv2D, Pool2D, ToFrames, ToValues
from .feedforward import Activation, Affine, Columns, Dense, Dropout, Embedding, Identity, LayerNorm
from .linear_recurrence import MinGru, RgLru
from .pooling import GlobalPooling
from .sequence import DuplicateToTimeSeries, Mask, Reverse
from .specs import (
    ActivationSpec,
    AttentionSpec,
    CnnToRnnSpec,
    ColumnsSpec,
    Conv1DSpec,
    Conv2DSpec,
    DenseSpec,
    DropoutSpec,
    DuplicateToTimeSeriesSpec,
    ElementwiseSpec,
    EmbeddingSpec,
    GlobalPoolingSpec,
    IdentityAdapterSpec,
    LastTimeStepSpec,
    LayerNormSpec,
    MaskSpec,
    MergeSpec,
    Pool2DSpec,
    ReverseSpec,
    RnnLossSpec,
    RnnOutputSpec,
    RnnToCnnSpec,
    ScaleSpec,
    ShiftSpec,
    SubsetSpec,
    TimeDistributedSpec,
)
from .stack import Placed
from .stepwise import Stepwise
from .wrappers import Bidirectional, MaskZero


def build(placed: Placed) -> Layer:
    """The layer of a placed specification, with fresh weights."""
    name, spec, size = placed.name, placed.spec, placed.shape.size or 0
    match spec:
        case SimpleRnnSpec() | LstmSpec() | GravesLstmSpec() | GruSpec() | SlstmSpec() | MinGruSpec() | RgLruSpec():
            return _cell(name, spec, size)
        case BidirectionalSpec():
            return Bidirectional(name, spec, _cell("forwards", spec.layer, size), _cell("backwards", spec.layer, size))
        case MaskZeroSpec():
            return MaskZero(name, spec, _cell(name, spec.layer, size))
        case DenseSpec():
            return Dense(name, spec, size)
        case TimeDistributedSpec():
            return Dense(name, spec.layer, size)
        case ActivationSpec():
            return Activation(name, spec)
        case LayerNormSpec():
            return LayerNorm(name, spec, size)
        case DropoutSpec():
            return Dropout(name, spec)
        case EmbeddingSpec():
            return Embedding(name, spec)
        case GlobalPoolingSpec():
            return GlobalPooling(name, spec, size)
        case AttentionSpec():
            return Attention(name, spec, size)
        case Conv1DSpec():
            return Conv1D(name, spec, size)
        case Conv2DSpec():
            return Conv2D(name, spec, placed.shape.frame[0] if placed.shape.frame else 1)
        case Pool2DSpec():
            return Pool2D(name, spec)
        case RnnToCnnSpec():
            return ToFrames(name, (spec.channels, spec.height, spec.width))
        case CnnToRnnSpec():
            return ToValues(name, size)
        case ReverseSpec():
            return Reverse(name)
        case DuplicateToTimeSeriesSpec():
            return DuplicateToTimeSeries(name)
        case MaskSpec():
            return Mask(name, 3 if placed.shape.frame else 1)
        case ColumnsSpec():
            return Columns(name, spec.columns)
        case SubsetSpec():
            return Columns(name, range(spec.first, spec.last + 1))
        case ScaleSpec():
            return Affine(name, factor=spec.factor)
        case ShiftSpec():
            return Affine(name, amount=spec.amount)
        case LastTimeStepSpec() | IdentityAdapterSpec() | MergeSpec() | ElementwiseSpec():
            return Identity(name)
        case RnnOutputSpec() | RnnLossSpec():
            raise TypeError(f"{spec.kind} is the head of a network, not a layer of its stack")


def _cell(name: str, spec: CellSpec, size: int) -> Stepwise:
    match spec:
        case SimpleRnnSpec():
            return SimpleRnn(name, spec, size)
        case LstmSpec():
            return Lstm(name, spec, size)
        case GravesLstmSpec():
            return GravesLstm(name, spec, size)
        case GruSpec():
            return Gru(name, spec, size)
        case SlstmSpec():
            return Slstm(name, spec, size)
        case MinGruSpec():
            return MinGru(name, spec, size)
        case RgLruSpec():
            return RgLru(name, spec, size)
