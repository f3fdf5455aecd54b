"""The protocol's messages by their published names and numbers, made when this module is imported.

The fields stand here as in a .proto file, without a compiler: nothing is generated or built, and the descriptors lie
in a pool of their own, so that a process may hold a client's generated copy of the same protocol beside them. Messages
of Triton's model configuration have the fields that are told of a model here. A test compares all of it with a client's
own descriptors; a running server tells it by reflection.
"""

import re
from typing import Any, Final

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

PACKAGE: Final = "inference"
SERVICE: Final = f"{PACKAGE}.GRPCInferenceService"

_TENSOR: Final = "string name = 1; string datatype = 2; repeated int64 shape = 3"
_PARAMETERS: Final = "map InferParameter parameters = 4"
_NAMED: Final = "string name = 1; string version = 2"

_MESSAGES: Final = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "bool live = 1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "bool ready = 1",
    "ModelReadyRequest": _NAMED,
    "ModelReadyResponse": "bool ready = 1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": f"{_NAMED}; repeated string extensions = 3",
    "ModelMetadataRequest": _NAMED,
    "ModelMetadataResponse": "string name = 1; repeated string versions = 2; string platform = 3; "
    "repeated ModelMetadataResponse.TensorMetadata inputs = 4; "
    "repeated ModelMetadataResponse.TensorMetadata outputs = 5",
    "ModelMetadataResponse.TensorMetadata": _TENSOR,
    "InferParameter": "oneof parameter_choice bool bool_param = 1; oneof parameter_choice int64 int64_param = 2; "
    "oneof parameter_choice string string_param = 3; oneof parameter_choice double double_param = 4; "
    "oneof parameter_choice uint64 uint64_param = 5",
    "InferTensorContents": "repeated bool bool_contents = 1; repeated int32 int_contents = 2; "
    "repeated int64 int64_contents = 3; repeated uint32 uint_contents = 4; repeated uint64 uint64_contents = 5; "
    "repeated float fp32_contents = 6; repeated double fp64_contents = 7; repeated bytes bytes_contents = 8",
    "ModelInferRequest": f"string model_name = 1; string model_version = 2; string id = 3; {_PARAMETERS}; "
    "repeated ModelInferRequest.InferInputTensor inputs = 5; "
    "repeated ModelInferRequest.InferRequestedOutputTensor outputs = 6; repeated bytes raw_input_contents = 7",
    "ModelInferRequest.InferInputTensor": f"{_TENSOR}; {_PARAMETERS}; InferTensorContents contents = 5",
    "ModelInferRequest.InferRequestedOutputTensor": "string name = 1; map InferParameter parameters = 2",
    "ModelInferResponse": f"string model_name = 1; string model_version = 2; string id = 3; {_PARAMETERS}; "
    "repeated ModelInferResponse.InferOutputTensor outputs = 5; repeated bytes raw_output_contents = 6",
    "ModelInferResponse.InferOutputTensor": f"{_TENSOR}; {_PARAMETERS}; InferTensorContents contents = 5",
    "ModelStreamInferResponse": "string error_message = 1; ModelInferResponse infer_response = 2",
    "ModelConfigRequest": _NAMED,
    "ModelConfigResponse": "ModelConfig config = 1",
    "ModelStatisticsRequest": _NAMED,
    "ModelStatisticsResponse": "repeated ModelStatistics model_stats = 1",
    "ModelStatistics": f"{_NAMED}; uint64 last_inference = 3; uint64 inference_count = 4; uint64 execution_count = 5; "
    "InferStatistics inference_stats = 6; repeated InferBatchStatistics batch_stats = 7; "
    "repeated MemoryUsage memory_usage = 8; map InferResponseStatistics response_stats = 9",
    "StatisticDuration": "uint64 count = 1; uint64 ns = 2",
    "InferStatistics": "StatisticDuration success = 1; StatisticDuration fail = 2; StatisticDuration queue = 3; "
    "StatisticDuration compute_input = 4; StatisticDuration compute_infer = 5; StatisticDuration compute_output = 6; "
    "StatisticDuration cache_hit = 7; StatisticDuration cache_miss = 8",
    "InferResponseStatistics": "StatisticDuration compute_infer = 1; StatisticDuration compute_output = 2; "
    "StatisticDuration success = 3; StatisticDuration fail = 4; StatisticDuration empty_response = 5; "
    "StatisticDuration cancel = 6",
    "InferBatchStatistics": "uint64 batch_size = 1; StatisticDuration compute_input = 2; "
    "StatisticDuration compute_infer = 3; StatisticDuration compute_output = 4",
    "MemoryUsage": "string type = 1; int64 id = 2; uint64 byte_size = 3",
    "RepositoryIndexRequest": "string repository_name = 1; bool ready = 2",
    "RepositoryIndexResponse": "repeated RepositoryIndexResponse.ModelIndex models = 1",
    "RepositoryIndexResponse.ModelIndex": f"{_NAMED}; string state = 3; string reason = 4",
    "ModelConfig": "string name = 1; string platform = 2; ModelVersionPolicy version_policy = 3; "
    "int32 max_batch_size = 4; repeated ModelInput input = 5; repeated ModelOutput output = 6; "
    "oneof scheduling_choice ModelSequenceBatching sequence_batching = 13; map ModelParameter parameters = 14; "
    "string default_model_filename = 8; string backend = 17; ModelTransactionPolicy model_transaction_policy = 19; "
    "string runtime = 25",
    "ModelVersionPolicy": "oneof policy_choice ModelVersionPolicy.Latest latest = 1; "
    "oneof policy_choice ModelVersionPolicy.All all = 2; oneof policy_choice ModelVersionPolicy.Specific specific = 3",
    "ModelVersionPolicy.Latest": "uint32 num_versions = 1",
    "ModelVersionPolicy.All": "",
    "ModelVersionPolicy.Specific": "repeated int64 versions = 1",
    "ModelInput": "string name = 1; DataType data_type = 2; repeated int64 dims = 4; bool optional = 8",
    "ModelOutput": "string name = 1; DataType data_type = 2; repeated int64 dims = 3",
    "ModelSequenceBatching": "uint64 max_sequence_idle_microseconds = 1; "
    "repeated ModelSequenceBatching.ControlInput control_input = 2; "
    "oneof strategy_choice ModelSequenceBatching.StrategyDirect direct = 3; "
    "oneof strategy_choice ModelSequenceBatching.StrategyOldest oldest = 4; "
    "repeated ModelSequenceBatching.State state = 5; bool iterative_sequence = 6",
    "ModelSequenceBatching.Control": "ModelSequenceBatching.Control.Kind kind = 1; "
    "repeated int32 int32_false_true = 2; repeated float fp32_false_true = 3; DataType data_type = 4; "
    "repeated bool bool_false_true = 5",
    "ModelSequenceBatching.ControlInput": "string name = 1; repeated ModelSequenceBatching.Control control = 2",
    "ModelSequenceBatching.InitialState": "DataType data_type = 1; repeated int64 dims = 2; "
    "oneof state_data bool zero_data = 3; oneof state_data string data_file = 4; string name = 5",
    "ModelSequenceBatching.State": "string input_name = 1; string output_name = 2; DataType data_type = 3; "
    "repeated int64 dims = 4; repeated ModelSequenceBatching.InitialState initial_state = 5; "
    "bool use_same_buffer_for_input_output = 6; bool use_growable_memory = 7",
    "ModelSequenceBatching.StrategyDirect": "uint64 max_queue_delay_microseconds = 1; "
    "float minimum_slot_utilization = 2",
    "ModelSequenceBatching.StrategyOldest": "int32 max_candidate_sequences = 1; "
    "repeated int32 preferred_batch_size = 2; uint64 max_queue_delay_microseconds = 3; bool preserve_ordering = 4",
    "ModelTransactionPolicy": "bool decoupled = 1",
    "ModelParameter": "string string_value = 1",
}
"""Message: its fields. `map X name` is `map<string, X> name`; `oneof NAME` stands before a field of one."""

_ENUMS: Final = {
    "DataType": "TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_UINT16 TYPE_UINT32 TYPE_UINT64 TYPE_INT8 TYPE_INT16 "
    "TYPE_INT32 TYPE_INT64 TYPE_FP16 TYPE_FP32 TYPE_FP64 TYPE_STRING TYPE_BF16",
    "ModelSequenceBatching.Control.Kind": "CONTROL_SEQUENCE_START CONTROL_SEQUENCE_READY CONTROL_SEQUENCE_END "
    "CONTROL_SEQUENCE_CORRID",
}
"""Enumeration: its values, from 0."""

METHODS: Final = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelStreamInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
)
STREAM: Final = "ModelStreamInfer"

_FIELD: Final = re.compile(r"(?:oneof (\w+) )?(?:(repeated|map) )?([\w.]+) (\w+) = (\d+)")
_KINDS: Final = {kind.lower().removeprefix("type_"): value for kind, value in FieldDescriptorProto.Type.items()}


def _described() -> FileDescriptorProto:
    """The protocol as a file descriptor."""
    file = FileDescriptorProto(name="open_inference_grpc.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, DescriptorProto] = {}
    for name in (*_MESSAGES, *_ENUMS):
        outer, _, own = name.rpartition(".")
        if name in _MESSAGES:
            made[name] = (made[outer].nested_type if outer else file.message_type).add(name=own)
        else:
            enum: EnumDescriptorProto = (made[outer].enum_type if outer else file.enum_type).add(name=own)
            for number, value in enumerate(_ENUMS[name].split()):
                enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        for text in filter(None, fields.split("; ")):
            _add(made[name], name, text)
    service = file.service.add(name=SERVICE.removeprefix(f"{PACKAGE}."))
    for method in METHODS:
        streams = method == STREAM
        request = "ModelInferRequest" if streams else f"{method}Request"
        service.method.add(
            name=method,
            input_type=f".{PACKAGE}.{request}",
            output_type=f".{PACKAGE}.{method}Response",
            client_streaming=streams,
            server_streaming=streams,
        )
    return file


def _add(message: DescriptorProto, path: str, text: str) -> None:
    """Add a field, as it stands in _MESSAGES, to a message."""
    found = _FIELD.fullmatch(text)
    assert found is not None, text
    choice, label, kind, name, number = found.groups()
    field = message.field.add(name=name, number=int(number), label=FieldDescriptorProto.LABEL_OPTIONAL)
    if label is not None:
        field.label = FieldDescriptorProto.LABEL_REPEATED
    if label == "map":
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add(entry, path, "string key = 1")
        _add(entry, path, f"{kind} value = 2")
        kind = f"{path}.{entry.name}"
    if kind in _KINDS:
        field.type = _KINDS[kind]
    else:
        field.type = FieldDescriptorProto.TYPE_ENUM if kind in _ENUMS else FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"
    if choice is not None:
        known = [each.name for each in message.oneof_decl]
        if choice not in known:
            message.oneof_decl.add(name=choice)
            known.append(choice)
        field.oneof_index = known.index(choice)


POOL: Final = DescriptorPool()
"""Descriptors of all services of the server; the others are added by server.py."""
POOL.Add(_described())


def message(name: str) -> Any:
    """The class of a message of the protocol."""
    return GetMessageClass(POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


InferRequest: Final = message("ModelInferRequest")
InferResponse: Final = message("ModelInferResponse")
StreamInferResponse: Final = message("ModelStreamInferResponse")
