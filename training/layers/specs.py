"""The `network:` list of a training configuration: one frozen class per layer kind.

Each class says what its kind may stand on (`out_shape`), without knowing torch, so that an illegal stack is refused
when the configuration is read. DL4J's names are used where DL4J has one.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..activations import ActivationName
from .distribution_specs import DistributionSpec
from .weights import WeightInit

Size = Annotated[int, Field(ge=1)]
Pair = tuple[Size, Size]


@dataclass(frozen=True)
class Shape:
    """What flows from one layer to the next.

    Attributes:
        size: Values per step; None while the data is not open yet.
        frame: (channels, height, width) where each step is a frame, else None.
        summary: The many-to-one readout is behind us: one answer per sequence (at every step: of the steps so far).
    """

    size: int | None = None
    frame: tuple[int, int, int] | None = None
    summary: bool = False


class IllegalStack(ValueError):
    """A layer cannot stand where it stands; the caller adds the path."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str | None = Field(default=None, pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$", description="default: kind_number")

    wants: ClassVar[Literal["values", "frames", "either"]] = "values"

    def out_shape(self, shape: Shape) -> Shape:
        """The shape behind this layer, which stands on what it `wants`.

        Raises:
            IllegalStack: this kind cannot stand on `shape`.
        """
        return shape

    @property
    def streams(self) -> bool:
        """Can it be stepped? False if an output depends on later steps."""
        return True

    @property
    def recurrent(self) -> bool:
        """Does truncated backpropagation cut here?"""
        return False


class _Recurrent(_Spec):
    units: Size
    activation: ActivationName = "tanh"
    weight_init: WeightInit = "xavier_uniform"
    recurrent_init: WeightInit = "orthogonal"
    layer_norm: bool = False

    def out_shape(self, shape: Shape) -> Shape:
        if shape.summary:
            raise IllegalStack("a recurrent layer behind the many-to-one readout has no steps left to run over")
        return replace(shape, size=self.units, frame=None)

    @property
    def recurrent(self) -> bool:
        return True


class SimpleRnnSpec(_Recurrent):
    """h_t = activation(W x_t + R h_{t-1} + b)."""

    kind: Literal["simple_rnn"]


class _Gated(_Recurrent):
    gate_activation: ActivationName = "sigmoid"


class LstmSpec(_Gated):
    """Long short-term memory without peepholes."""

    kind: Literal["lstm"]
    forget_bias: float = 1.0


class GravesLstmSpec(_Gated):
    """LSTM with peepholes: input and forget gate also see the old cell state, the output gate the new one."""

    kind: Literal["graves_lstm"]
    forget_bias: float = 1.0


class GruSpec(_Gated):
    """Gated recurrent unit, the reset gate behind the recurrent product (cuDNN's and ONNX's linear_before_reset)."""

    kind: Literal["gru"]


CellSpec = Annotated[SimpleRnnSpec | LstmSpec | GravesLstmSpec | GruSpec, Field(discriminator="kind")]


class DenseSpec(_Spec):
    """activation(W x + b), at every step."""

    kind: Literal["dense"]
    units: Size
    activation: ActivationName = "tanh"
    weight_init: WeightInit = "xavier_uniform"
    bias: float = 0.0

    def out_shape(self, shape: Shape) -> Shape:
        return replace(shape, size=self.units, frame=None)


class DropoutSpec(_Spec):
    """Zeroes values with probability `p` while training."""

    wants = "either"
    kind: Literal["dropout"]
    p: float = Field(ge=0, lt=1)


class BidirectionalSpec(_Spec):
    """A recurrent layer and its twin that reads each sequence backwards, from its last valid step.

    DL4J's GravesBidirectionalLSTM is mode add around graves_lstm.
    """

    kind: Literal["bidirectional"]
    layer: CellSpec
    mode: Literal["concat", "add", "mul", "average"] = "concat"
    last: bool = Field(
        default=False,
        description="many-to-one: each direction's own last output (Bidirectional around LastTimeStep)",
    )

    def out_shape(self, shape: Shape) -> Shape:
        size = self.layer.units * (2 if self.mode == "concat" else 1)
        return replace(self.layer.out_shape(shape), size=size, summary=self.last)

    @property
    def streams(self) -> bool:
        return False

    @property
    def recurrent(self) -> bool:
        return True


class MaskZeroSpec(_Spec):
    """A recurrent layer that skips the steps where every input is `value`."""

    kind: Literal["mask_zero"]
    layer: CellSpec
    value: float = 0.0

    def out_shape(self, shape: Shape) -> Shape:
        return self.layer.out_shape(shape)

    @property
    def recurrent(self) -> bool:
        return True


class TimeDistributedSpec(_Spec):
    """Says that a dense layer acts on each step alone. All of ours do; DL4J's name is welcome all the same."""

    kind: Literal["time_distributed"]
    layer: DenseSpec

    def out_shape(self, shape: Shape) -> Shape:
        return self.layer.out_shape(shape)


class LastTimeStepSpec(_Spec):
    """Many-to-one: the answer is the one at the last valid step.

    Values pass through: at every step stands the answer for the sequence so far, so that the model can be stepped.
    """

    kind: Literal["last_time_step"]

    def out_shape(self, shape: Shape) -> Shape:
        if shape.summary:
            raise IllegalStack("there is a many-to-one readout below already")
        return replace(shape, summary=True)


class GlobalPoolingSpec(_Spec):
    """Many-to-one: maximum, mean, sum or p-norm over the steps so far."""

    kind: Literal["global_pooling"]
    pooling: Literal["max", "avg", "sum", "pnorm"] = "max"
    p: float = Field(default=2.0, ge=1)

    def out_shape(self, shape: Shape) -> Shape:
        if shape.summary:
            raise IllegalStack("there is a many-to-one readout below already")
        return replace(shape, summary=True)


class ReverseSpec(_Spec):
    """Each row's present steps in reverse (DL4J: ReverseTimeSeriesVertex)."""

    wants = "either"
    kind: Literal["reverse"]

    def out_shape(self, shape: Shape) -> Shape:
        if shape.summary:
            raise IllegalStack("reverse behind the many-to-one readout has no steps left to turn around")
        return shape

    @property
    def streams(self) -> bool:
        return False


class DuplicateToTimeSeriesSpec(_Spec):
    """The many-to-one readout's answer to the whole row, copied to every present step: what a decoder reads."""

    wants = "either"
    kind: Literal["duplicate_to_time_series"]

    def out_shape(self, shape: Shape) -> Shape:
        if not shape.summary:
            raise IllegalStack(
                "duplicate_to_time_series copies the answer of a many-to-one readout, and there is none below. "
                "Put last_time_step before it."
            )
        return replace(shape, summary=False)

    @property
    def streams(self) -> bool:
        return False


class MaskSpec(_Spec):
    """Zeros at absent steps (DL4J: MaskLayer). Layers see present steps only, so it changes no answer."""

    wants = "either"
    kind: Literal["mask"]


class EmbeddingSpec(_Spec):
    """A learned vector for each of `vocabulary` tokens; the input is one token's number per step."""

    kind: Literal["embedding"]
    vocabulary: Size
    units: Size
    activation: ActivationName = "identity"

    def out_shape(self, shape: Shape) -> Shape:
        if shape.size not in (None, 1):
            raise IllegalStack(f"embedding takes one token per step, got {shape.size} values")
        return replace(shape, size=self.units)


class Conv1DSpec(_Spec):
    """Convolution over time that looks back only: the steps it needs from before are its state."""

    kind: Literal["conv1d"]
    units: Size
    kernel: Size = 3
    dilation: Size = 1
    activation: ActivationName = "relu"
    weight_init: WeightInit = "relu_uniform"

    def out_shape(self, shape: Shape) -> Shape:
        if shape.summary:
            raise IllegalStack("conv1d behind the many-to-one readout has no steps left to run over")
        return replace(shape, size=self.units)


class _Frames(_Spec):
    wants = "frames"
    kernel: Pair
    stride: Pair = (1, 1)
    padding: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = (0, 0)

    def _window(self, shape: Shape, channels: int) -> Shape:
        assert shape.frame is not None
        sides = [
            (side + 2 * pad - kernel) // stride + 1
            for side, pad, kernel, stride in zip(shape.frame[1:], self.padding, self.kernel, self.stride, strict=True)
        ]
        if min(sides) < 1:
            raise IllegalStack(f"a kernel of {self.kernel} is larger than frames of {shape.frame[1:]}")
        return replace(shape, frame=(channels, sides[0], sides[1]), size=channels * sides[0] * sides[1])


class Conv2DSpec(_Frames):
    """Convolution over each frame."""

    kind: Literal["conv2d"]
    units: Size
    activation: ActivationName = "relu"
    weight_init: WeightInit = "relu_uniform"

    def out_shape(self, shape: Shape) -> Shape:
        return self._window(shape, self.units)


class Pool2DSpec(_Frames):
    """Maximum or mean over windows of each frame (DL4J: Subsampling)."""

    kind: Literal["pool2d"]
    pooling: Literal["max", "avg"] = "max"

    def out_shape(self, shape: Shape) -> Shape:
        assert shape.frame is not None
        if any(2 * pad > kernel for pad, kernel in zip(self.padding, self.kernel, strict=True)):
            raise IllegalStack(f"padding {self.padding} is more than half of kernel {self.kernel}")
        return self._window(shape, shape.frame[0])


class RnnToCnnSpec(_Spec):
    """Values to frames: channels * height * width of them, in this order."""

    kind: Literal["rnn_to_cnn"]
    height: Size
    width: Size
    channels: Size = 1

    def out_shape(self, shape: Shape) -> Shape:
        size = self.channels * self.height * self.width
        if shape.size not in (None, size):
            raise IllegalStack(
                f"frames of {self.channels} x {self.height} x {self.width} need {size} values, got {shape.size}"
            )
        return replace(shape, size=size, frame=(self.channels, self.height, self.width))


class CnnToRnnSpec(_Spec):
    """Frames to values, channels * height * width; put in by itself where it is needed."""

    wants = "frames"
    kind: Literal["cnn_to_rnn", "cnn_to_feed_forward"]

    def out_shape(self, shape: Shape) -> Shape:
        return replace(shape, frame=None)


class IdentityAdapterSpec(_Spec):
    """DL4J's adapters between steps as rows and steps as an axis; here values always have their time axis."""

    kind: Literal["rnn_to_feed_forward", "feed_forward_to_rnn"]


LossName = Literal[
    "mcxent",
    "negativeloglikelihood",
    "sparse_mcxent",
    "xent",
    "mse",
    "squared_loss",
    "l2",
    "mae",
    "l1",
    "huber",
    "mape",
    "msle",
    "poisson",
    "hinge",
    "squared_hinge",
    "cosine_proximity",
    "kl_divergence",
    "wasserstein",
]


CLASS_LOSSES = ("mcxent", "negativeloglikelihood", "sparse_mcxent")


class _Output(_Spec):
    loss: LossName | None = Field(default=None, description="default: mcxent for classes, mse for numbers")
    activation: ActivationName | None = Field(default=None, description="default: softmax for classes, else identity")
    loss_weights: tuple[float, ...] | None = Field(default=None, description="one per output")
    residual: bool = Field(
        default=False, description="outputs named as a feature are added to that feature's last reading"
    )
    distribution: DistributionSpec | None = Field(default=None, description="instead of a loss and an activation")

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        """DL4J's output validation: a probability loss wants probabilities."""
        name = self.loss or ""
        if self.distribution is not None and (self.loss or self.activation):
            raise ValueError(f"distribution {self.distribution.kind} has its own loss and activation. Leave them out.")
        bounded = {None: True, "softmax": True, "sigmoid": True, "hardsigmoid": True}
        if name in CLASS_LOSSES and self.activation not in (None, "softmax"):
            raise ValueError(f"loss {name} wants activation softmax, got {self.activation}")
        if name == "xent" and self.activation == "softmax":
            raise ValueError("loss xent wants activation sigmoid, got softmax; for classes take mcxent")
        if name in ("xent", "kl_divergence") and self.activation not in bounded:
            raise ValueError(f"loss {name} wants an activation between 0 and 1, got {self.activation}")
        return self


class RnnOutputSpec(_Output):
    """Dense and loss at every step; as many units as the data has outputs."""

    kind: Literal["rnn_output"]
    units: Size | None = Field(default=None, description="default: what the data has; another number is an error")
    weight_init: WeightInit = "xavier_uniform"


class RnnLossSpec(_Output):
    """Activation and loss without parameters: the layer below has as many units as the data has outputs."""

    kind: Literal["rnn_loss"]


LayerSpec = Annotated[
    SimpleRnnSpec
    | LstmSpec
    | GravesLstmSpec
    | GruSpec
    | BidirectionalSpec
    | MaskZeroSpec
    | TimeDistributedSpec
    | LastTimeStepSpec
    | GlobalPoolingSpec
    | ReverseSpec
    | DuplicateToTimeSeriesSpec
    | MaskSpec
    | DenseSpec
    | EmbeddingSpec
    | Conv1DSpec
    | Conv2DSpec
    | Pool2DSpec
    | DropoutSpec
    | RnnToCnnSpec
    | CnnToRnnSpec
    | IdentityAdapterSpec
    | RnnOutputSpec
    | RnnLossSpec,
    Field(discriminator="kind"),
]
