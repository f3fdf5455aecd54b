"""The `network:` list of a training configuration: one frozen class per layer kind.

Each class says what its kind may stand on (`out_shape`), without knowing torch, so that an illegal stack is refused
when the configuration is read. DL4J's names are used where DL4J has one.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..activations import ActivationName
from .weights import WeightInit

Size = Annotated[int, Field(ge=1)]
RecurrentActivation = ActivationName
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
    """A layer can not stand where it stands; the caller adds the path."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str | None = Field(default=None, pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$", description="default: kind_number")

    def out_shape(self, shape: Shape) -> Shape:
        """The shape behind this layer.

        Raises:
            IllegalStack: this kind can not stand on `shape`.
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

    kind: Literal["dropout"]
    p: float = Field(ge=0, lt=1)


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


class _Output(_Spec):
    loss: LossName | None = Field(default=None, description="default: mcxent for classes, mse for numbers")
    activation: ActivationName | None = Field(default=None, description="default: softmax for classes, else identity")
    loss_weights: tuple[float, ...] | None = Field(default=None, description="one per output")
    residual: bool = Field(
        default=False, description="outputs named as a feature are added to that feature's last reading"
    )


class RnnOutputSpec(_Output):
    """Dense and loss at every step; as many units as the data has outputs."""

    kind: Literal["rnn_output"]
    units: Size | None = Field(default=None, description="default: what the data has; another number is an error")
    weight_init: WeightInit = "xavier_uniform"


class RnnLossSpec(_Output):
    """Activation and loss without parameters: the layer below has as many units as the data has outputs."""

    kind: Literal["rnn_loss"]


LayerSpec = Annotated[
    SimpleRnnSpec | LstmSpec | GravesLstmSpec | GruSpec | DenseSpec | DropoutSpec | RnnOutputSpec | RnnLossSpec,
    Field(discriminator="kind"),
]
