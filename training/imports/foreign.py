"""From layers and weights that were read from somebody else's file to a model directory, by the usual export.

golden.npz is made by torch from random readings, and proves model.onnx. If the other framework's own answers are
there, they are held against both ways of running the graph: whole sequences, and one step at a time.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from stepcast.errors import ConfigError, ManifestError
from stepcast.manifest import MODEL_FILE, Feature, Manifest, Output, sha256_of

from ..data.in_memory import Examples, InMemory
from ..export import manifest_of, next_version, publish, stage, state_tensors
from ..golden import ROWS, STEPS
from ..layers.specs import EmbeddingSpec, LayerSpec
from ..layers.stack import TokenReader
from ..network import Network
from ..start import fill
from ..stepper import Stepper

Floats = NDArray[np.float32]
_SPECS: TypeAdapter[tuple[LayerSpec, ...]] = TypeAdapter(tuple[LayerSpec, ...])
