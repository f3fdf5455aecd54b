"""Weight initialisation by DL4J's names, with the fan-in and fan-out the layer states itself."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

WeightInit = Literal[
    "xavier",
    "xavier_uniform",
    "relu",
    "relu_uniform",
    "lecun_normal",
    "lecun_uniform",
    "uniform",
    "normal",
    "orthogonal",
    "identity",
    "zero",
    "ones",
]


@torch.no_grad()
def initialise(weight: Tensor, how: WeightInit, fan_in: int, fan_out: int) -> None:
    """Fill a weight in place.

    xavier: N(0, 2 / (in + out)); relu: N(0, 2 / in); lecun and normal: N(0, 1 / in); the _uniform ones have the
    same variance on an interval around 0; uniform: the interval of width 2 / sqrt(in).
    """
    variance = {
        "xavier": 2.0 / (fan_in + fan_out),
        "relu": 2.0 / fan_in,
        "lecun": 1.0 / fan_in,
        "normal": 1.0 / fan_in,
    }
    kind, _, shape = how.partition("_")
    if kind in variance and shape == "uniform":
        limit = math.sqrt(3.0 * variance[kind])
        weight.uniform_(-limit, limit)
    elif kind in variance:
        weight.normal_(0.0, math.sqrt(variance[kind]))
    elif how == "uniform":
        weight.uniform_(-1.0 / math.sqrt(fan_in), 1.0 / math.sqrt(fan_in))
    elif how == "orthogonal":
        nn.init.orthogonal_(weight)
    elif how == "identity":
        nn.init.eye_(weight)
    else:
        weight.fill_(0.0 if how == "zero" else 1.0)
