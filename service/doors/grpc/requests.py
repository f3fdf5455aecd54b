"""Between the protocol's messages and the requests and answers of doors/oip."""

from typing import Any, Final

from stepcast.errors import InvalidRequest

from ..oip.infer import Inferred
from ..oip.requests import Request, Wish
from ..oip.tensors import BYTES, Tensor
from .messages import InferRequest
from .server import parsed

_CONTENTS: Final = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
"""Which typed contents a datatype has; FP16 and BF16 have raw contents alone."""


def read(data: bytes) -> Request:
    """A request; Malformed or InvalidRequest where it is none."""
    message = parsed(InferRequest, data)
    raw, said = message.raw_input_contents, message.parameters
    inputs = [_tensor(tensor, i, raw) for i, tensor in enumerate(message.inputs)]
    if raw and len(raw) != len(inputs):
        raise InvalidRequest(f"there are {len(raw)} raw_input_contents for {len(inputs)} inputs, want one for each")
    parameters = {name: _value(name, said[name]) for name in said}  # a loop over items() takes twice as long
    wishes = [_wish(output) for output in message.outputs]
    return Request(message.model_name, inputs, wishes, message.model_version, message.id, parameters)


def _tensor(tensor: Any, place: int, raw: Any) -> Tensor:
    if tensor.parameters and any(name.startswith("shared_memory") for name in tensor.parameters):
        raise InvalidRequest(f"input {tensor.name!r} lies in shared memory, which this server does not read")
    shape = list(tensor.shape)
    if raw:
        if tensor.HasField("contents"):
            text = f"input {tensor.name!r} has contents, and there are raw_input_contents. Send one of them."
            raise InvalidRequest(text)
        return Tensor(tensor.name, tensor.datatype, shape, raw[place] if place < len(raw) else b"")
    kind = _CONTENTS.get(tensor.datatype)
    return Tensor(tensor.name, tensor.datatype, shape, None, kind and list(getattr(tensor.contents, kind)))


def _value(name: str, value: Any) -> Any:
    """A parameter's value; a sequence's id beyond 63 bits comes as a negative number."""
    choice = value.WhichOneof("parameter_choice")
    if choice is None:
        raise InvalidRequest(f"parameter {name[:64]!r} has no value")
    found = getattr(value, choice)
    return found % 2**64 if name == "sequence_id" and choice == "int64_param" else found


def _wish(output: Any) -> Wish:
    classes = 0
    for name, value in output.parameters.items():
        if name == "classification":
            classes = _value(name, value)
            if classes.__class__ is not int or classes < 0:
                raise InvalidRequest("output parameter 'classification' is not a number of classes")
        elif name.startswith("shared_memory"):
            raise InvalidRequest(f"output {output.name!r} wants shared memory, which this server does not write")
    return Wish(output.name, classes)


def write(response: Any, answer: Inferred) -> None:
    """Fill in a ModelInferResponse."""
    response.model_name, response.model_version = answer.model, str(answer.version)
    if answer.id:
        response.id = answer.id
    if answer.step is not None:
        response.parameters["stepcast_step"].int64_param = answer.step
    for output in answer.outputs:
        response.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        response.raw_output_contents.append(output.raw)
