"""The `distribution:` of an output layer: what it says of each target besides one number."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Level = Annotated[float, Field(gt=0, lt=1)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class QuantileSpec(_Spec):
    """Quantiles at fixed levels, in order by construction; the median is the point forecast."""

    kind: Literal["quantile"]
    levels: tuple[Level, ...] = Field(default=(0.1, 0.5, 0.9), description="ascending, 0.5 inside")

    @model_validator(mode="after")
    def _around_the_median(self) -> Self:
        if any(low >= high for low, high in pairwise(self.levels)):
            raise ValueError(f"levels {list(self.levels)} do not ascend")
        if 0.5 not in self.levels[1:-1]:
            raise ValueError(f"levels {list(self.levels)} want 0.5 and a level on either side of it")
        return self


class GaussianSpec(_Spec):
    """Mean and standard deviation of a normal distribution."""

    kind: Literal["gaussian"]
    faithful: bool = Field(
        default=False, description="means learn as under mse; the scale shapes neither them nor the layers below"
    )


class StudentTSpec(_Spec):
    """Location, scale and degrees of freedom (more than 2) of Student's t: gaussian with outliers."""

    kind: Literal["student_t"]


class NegativeBinomialSpec(_Spec):
    """Mean and dispersion of counts, whose variance is mean + dispersion * mean²."""

    kind: Literal["negative_binomial"]


class MixtureSpec(_Spec):
    """A mixture of gaussians: weights, means and standard deviations."""

    kind: Literal["mixture"]
    components: int = Field(default=3, ge=2, le=16)


DistributionSpec = Annotated[
    QuantileSpec | GaussianSpec | StudentTSpec | NegativeBinomialSpec | MixtureSpec, Field(discriminator="kind")
]
