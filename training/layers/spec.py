"""What the specification of every layer kind has, and the shapes that flow between layers."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Size = Annotated[int, Field(ge=1)]
Pair = tuple[Size, Size]
Merge = Literal["concat", "add", "subtract", "mul", "average", "max", "min"]


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


class Spec(BaseModel):
    """A layer in the `network:` list.

    Class attributes:
        wants: What it stands on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    name: str | None = Field(default=None, pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$", description="default: kind_number")
    sources: tuple[str, ...] | None = Field(
        default=None,
        alias="from",
        min_length=1,
        description="names of layers below or of features; default: the layer before",
    )

    wants: ClassVar[Literal["values", "frames", "either"]] = "values"

    @field_validator("sources", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        """A single name may stand without its list."""
        return (given,) if isinstance(given, str) else given

    def out_shape(self, shape: Shape) -> Shape:
        """The shape behind this layer, which stands on what it `wants`.

        Raises:
            IllegalStack: this kind cannot stand on `shape`.
        """
        return shape

    @property
    def merges(self) -> Merge:
        """How several inputs become the one that it reads."""
        return "concat"

    @property
    def streams(self) -> bool:
        """Can it be stepped? False if an output depends on later steps."""
        return True

    @property
    def recurrent(self) -> bool:
        """Does truncated backpropagation cut here?"""
        return False


class Learns(Spec):
    """A layer with weights of its own, which may learn at a rate of their own, or not at all."""

    learning_rate: float | None = Field(default=None, gt=0, description="of this layer; default: the training's")
    frozen: bool = Field(default=False, description="its weights stay what they are when training begins")

    @model_validator(mode="after")
    def _learns_or_not(self) -> Self:
        if self.frozen and self.learning_rate is not None:
            raise ValueError("a frozen layer has no learning rate. Leave one of them out.")
        return self


def learning_of(spec: Spec) -> Learns | None:
    """The specification that says how a layer learns: that of the layer inside for a wrapper; None without weights."""
    inner = getattr(spec, "layer", spec)
    return inner if isinstance(inner, Learns) else None
