"""The recurrent kinds of the `network:` list, and the wrappers around them."""

from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..activations import ActivationName
from .spec import IllegalStack, Learns, Shape, Size, Spec
from .weights import WeightInit


class _Stepwise(Learns):
    units: Size
    weight_init: WeightInit = "xavier_uniform"

    def out_shape(self, shape: Shape) -> Shape:
        if shape.summary:
            raise IllegalStack("a recurrent layer behind the many-to-one readout has no steps left to run over")
        return replace(shape, size=self.units, frame=None)

    @property
    def recurrent(self) -> bool:
        return True


class _Recurrent(_Stepwise):
    activation: ActivationName = "tanh"
    recurrent_init: WeightInit = "orthogonal"
    layer_norm: bool = False


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
    """Gated recurrent unit, by default with the reset gate behind the recurrent product, as cuDNN has it."""

    kind: Literal["gru"]
    reset_after: bool = Field(default=True, description="false: the reset gate scales the state before the product")

    @model_validator(mode="after")
    def _plain(self) -> Self:
        if self.layer_norm and not self.reset_after:
            raise ValueError("layer_norm normalises the product with the whole state. Set reset_after: true.")
        return self


class SlstmSpec(_Recurrent):
    """LSTM with exponential input gate, normaliser and stabiliser (Beck et al. 2024: xLSTM's sLSTM, one head)."""

    kind: Literal["slstm"]
    forget_bias: float = 1.0


class MinGruSpec(_Stepwise):
    """GRU whose gate and candidate do not see the state (Feng et al. 2024: minGRU)."""

    kind: Literal["min_gru"]
    activation: ActivationName = Field(default="identity", description="of the candidate")


class RgLruSpec(_Stepwise):
    """Real-gated linear recurrent unit behind a linear layer (De et al. 2024: Griffin's RG-LRU)."""

    kind: Literal["rg_lru"]


CellSpec = Annotated[
    SimpleRnnSpec | LstmSpec | GravesLstmSpec | GruSpec | SlstmSpec | MinGruSpec | RgLruSpec,
    Field(discriminator="kind"),
]


class BidirectionalSpec(Spec):
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


class MaskZeroSpec(Spec):
    """A recurrent layer that skips the steps where every input is `value`."""

    kind: Literal["mask_zero"]
    layer: CellSpec
    value: float = 0.0

    def out_shape(self, shape: Shape) -> Shape:
        return self.layer.out_shape(shape)

    @property
    def recurrent(self) -> bool:
        return True
