"""The `network:` list of a training configuration: one frozen class per layer kind.

Each class says what its kind may stand on (`out_shape`), without knowing torch, so that an illegal stack is refused
when the configuration is read. DL4J's names are used where DL4J has one.
"""

from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..activations import ActivationName
from .cell_specs import (
    BidirectionalSpec,
    GravesLstmSpec,
    GruSpec,
    LstmSpec,
    MaskZeroSpec,
    MinGruSpec,
    RgLruSpec,
    SimpleRnnSpec,
    SlstmSpec,
)
from .distribution_specs import DistributionSpec
from .spec import IllegalStack, Learns, Merge, Pair, Shape, Size, Spec
from .weights import WeightInit


class DenseSpec(Learns):
    """activation(W x + b), at every step."""

    kind: Literal["dense"]
    units: Size
    activation: ActivationName = "tanh"
    weight_init: WeightInit = "xavier_uniform"
    bias: float = 0.0

    def out_shape(self, shape: Shape) -> Shape:
        return replace(shape, size=self.units, frame=None)


class ActivationSpec(Spec):
    """An activation alone (DL4J: ActivationLayer)."""

    kind: Literal["activation"]
    activation: ActivationName


class LayerNormSpec(Learns):
    """Each step's values, normalised over themselves, with a gain and a bias that learn."""

    kind: Literal["layer_norm"]
    epsilon: float = Field(default=1e-5, gt=0, description="added to the variance")


class DropoutSpec(Spec):
    """Zeroes values with probability `p` while training."""

    wants = "either"
    kind: Literal["dropout"]
    p: float = Field(ge=0, lt=1)


class TimeDistributedSpec(Spec):
    """Says that a dense layer acts on each step alone. All of ours do; DL4J's name is welcome all the same."""

    kind: Literal["time_distributed"]
    layer: DenseSpec

    def out_shape(self, shape: Shape) -> Shape:
        return self.layer.out_shape(shape)


class LastTimeStepSpec(Spec):
    """Many-to-one: the answer is the one at the last valid step.

    Values pass through: at every step stands the answer for the sequence so far, so that the model can be stepped.
    """

    kind: Literal["last_time_step"]

    def out_shape(self, shape: Shape) -> Shape:
        if shape.summary:
            raise IllegalStack("there is a many-to-one readout below already")
        return replace(shape, summary=True)


class GlobalPoolingSpec(Spec):
    """Many-to-one: maximum, mean, sum or p-norm over the steps so far."""

    kind: Literal["global_pooling"]
    pooling: Literal["max", "avg", "sum", "pnorm"] = "max"
    p: float = Field(default=2.0, ge=1)

    def out_shape(self, shape: Shape) -> Shape:
        if shape.summary:
            raise IllegalStack("there is a many-to-one readout below already")
        return replace(shape, summary=True)


class ReverseSpec(Spec):
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


class DuplicateToTimeSeriesSpec(Spec):
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


class MaskSpec(Spec):
    """Zeros at absent steps (DL4J: MaskLayer). Layers see present steps only, so it changes no answer."""

    wants = "either"
    kind: Literal["mask"]


class MergeSpec(Spec):
    """The values of all inputs side by side (DL4J: MergeVertex)."""

    kind: Literal["merge"]


class ElementwiseSpec(Spec):
    """Inputs of one size, place by place (DL4J: ElementWiseVertex). `add` makes a skip connection, `mul` a gate."""

    kind: Literal["add", "subtract", "mul", "average", "max", "min"]

    @property
    def merges(self) -> Merge:
        return self.kind


class SubsetSpec(Spec):
    """The values from `first` to `last`, both included (DL4J: SubsetVertex)."""

    kind: Literal["subset"]
    first: int = Field(ge=0)
    last: int = Field(ge=0)

    @model_validator(mode="after")
    def _forwards(self) -> Self:
        if self.first > self.last:
            raise ValueError(f"first {self.first} is behind last {self.last}")
        return self

    def out_shape(self, shape: Shape) -> Shape:
        if shape.size is not None and self.last >= shape.size:
            raise IllegalStack(f"subset goes up to value {self.last}, there are 0 to {shape.size - 1}")
        return replace(shape, size=self.last - self.first + 1)


class ColumnsSpec(Spec):
    """Some of the values: how a feature is taken out of the input. Never in a file, always put in."""

    kind: Literal["columns"] = "columns"
    columns: tuple[int, ...]

    def out_shape(self, shape: Shape) -> Shape:
        return replace(shape, size=len(self.columns))


class ScaleSpec(Spec):
    """Every value times `factor` (DL4J: ScaleVertex)."""

    wants = "either"
    kind: Literal["scale"]
    factor: float


class ShiftSpec(Spec):
    """Every value plus `amount` (DL4J: ShiftVertex)."""

    wants = "either"
    kind: Literal["shift"]
    amount: float


class EmbeddingSpec(Learns):
    """A learned vector for each of `vocabulary` tokens; the input is one token's number per step."""

    kind: Literal["embedding"]
    vocabulary: Size
    units: Size
    activation: ActivationName = "identity"

    def out_shape(self, shape: Shape) -> Shape:
        if shape.size not in (None, 1):
            raise IllegalStack(f"embedding takes one token per step, got {shape.size} values")
        return replace(shape, size=self.units)


class AttentionSpec(Learns):
    """Attention of each step over itself and those before it, `window` in all: keys and values are its state."""

    kind: Literal["attention"]
    units: Size
    window: Annotated[int, Field(ge=2)]
    heads: Size = 1
    weight_init: WeightInit = "xavier_uniform"

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.units % self.heads:
            raise ValueError(f"{self.units} units cannot be shared by {self.heads} heads")
        return self

    def out_shape(self, shape: Shape) -> Shape:
        if shape.summary:
            raise IllegalStack("attention behind the many-to-one readout has no steps left to look back on")
        return replace(shape, size=self.units)


class Conv1DSpec(Learns):
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


class _Frames(Spec):
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


class Conv2DSpec(_Frames, Learns):
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


class RnnToCnnSpec(Spec):
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


class CnnToRnnSpec(Spec):
    """Frames to values, channels * height * width; put in by itself where it is needed."""

    wants = "frames"
    kind: Literal["cnn_to_rnn", "cnn_to_feed_forward"]

    def out_shape(self, shape: Shape) -> Shape:
        return replace(shape, frame=None)


class IdentityAdapterSpec(Spec):
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


class OutputSpec(Spec):
    """What output layers have in common."""

    outputs: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="which of the data's outputs it answers; default: all"
    )
    weight: float = Field(default=1.0, gt=0, description="what its loss is multiplied with")
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
        bounded = {None: True, "softmax": True, "sigmoid": True, "hardsigmoid": True, "hardsigmoid6": True}
        if name in CLASS_LOSSES and self.activation not in (None, "softmax"):
            raise ValueError(f"loss {name} wants activation softmax, got {self.activation}")
        if name == "xent" and self.activation == "softmax":
            raise ValueError("loss xent wants activation sigmoid, got softmax; for classes take mcxent")
        if name in ("xent", "kl_divergence") and self.activation not in bounded:
            raise ValueError(f"loss {name} wants an activation between 0 and 1, got {self.activation}")
        return self


class RnnOutputSpec(OutputSpec, Learns):
    """Dense and loss at every step; as many units as the data has outputs."""

    kind: Literal["rnn_output"]
    units: Size | None = Field(default=None, description="default: what the data has; another number is an error")
    weight_init: WeightInit = "xavier_uniform"


class RnnLossSpec(OutputSpec):
    """Activation and loss without parameters: the layer below has as many units as the data has outputs."""

    kind: Literal["rnn_loss"]


LayerSpec = Annotated[
    SimpleRnnSpec
    | LstmSpec
    | GravesLstmSpec
    | GruSpec
    | SlstmSpec
    | MinGruSpec
    | RgLruSpec
    | BidirectionalSpec
    | MaskZeroSpec
    | TimeDistributedSpec
    | LastTimeStepSpec
    | GlobalPoolingSpec
    | ReverseSpec
    | DuplicateToTimeSeriesSpec
    | MaskSpec
    | MergeSpec
    | ElementwiseSpec
    | SubsetSpec
    | ScaleSpec
    | ShiftSpec
    | DenseSpec
    | ActivationSpec
    | LayerNormSpec
    | EmbeddingSpec
    | AttentionSpec
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
