"""import: what the names of a graph's tensors say, as exporters and people choose them."""

from pathlib import Path
from typing import Any

import foreign
import pytest
from onnx import TensorProto

from service.engine.imports.graphs import Graph
from service.engine.imports.names import Likeness, likeness
from service.engine.imports.roles import roles_of

FULL = """
h_in h_out, h_n h_out, state stateN, past_h present_h, prev_cell next_cell, hidden_in hidden_out, input_h output_h,
hx hy, cx cy, h h_updated, h h_new, prev_h next_h, h_prev h_next, h0 h0_out, c1 c1_out, h0 hn0, h_i h_o, hi ho,
stateIn stateOut, past_key_values.0.key present.0.key, past_key_1 present_key_1, conv_cache conv_cache_out,
in_cache2 out_cache2,
cached_len_0 new_cached_len_0, lstm.hidden.1 next.lstm.hidden.1, h_in:0 h_out:0
"""
LOOSE = """
h0 hn, h_0 h_n, h0 h1, c0 c_out, ht_1 ht, h_tm1 h_t, hidden_in h_out, h0 hidden, hidden_state h_out, input_2 output_2
"""
NONE = """
h0 cn, x y, input output, h_1_in h_2_out, h0_in h1_out, lstm0_h lstm2_h, h0 c0, h1 c1_out, input_2 activation_2,
input_3 tf_op_layer_stack_2, onnx::Gemm_1 onnx::Gemm_31, onnx::LSTM_12 158, s_0 getitem, input_2 output_3
"""


@pytest.mark.parametrize(
    ("pair", "want"),
    [
        (pair.strip(), want)
        for want, pairs in ((Likeness.FULL, FULL), (Likeness.LOOSE, LOOSE), (Likeness.NONE, NONE))
        for pair in pairs.split(",")
    ],
)
def test_names_of_a_state_before_and_after_are_alike(pair: str, want: Likeness) -> None:
    """What exporters and people call one state; numbers are layers, never dropped where both names have them."""
    assert likeness(*pair.split()) is want


WILD = """
a spectrum and caches
mix:1,257,1,2 conv_cache:2,1,16,16,33 tra_cache:2,3,1,1,16 inter_cache:2,1,33,16
enh:1,257,1,2 conv_cache_out:2,1,16,16,33 tra_cache_out:2,3,1,1,16 inter_cache_out:2,1,33,16

numbers alone
input_1:1,3,41 input_2:1,64 input_3:1,64 input_6:1,64
output_1:1,1,1 output_2:1,64 output_3:1,64 output_6:1,64

direction before
speech:b,t,400 in_cache0:b,128,19,1 in_cache1:b,128,19,1
logits:b,t,248 out_cache0:b,128,19,1 out_cache1:b,128,19,1

two outputs of which one is beside
main_input:n,1,42 vad_gru_prev_state:n,24 noise_gru_prev_state:n,48
denoise_output:n,1,22 vad_gru/next_state:n,24 noise_gru/next_state:n,48 vad_output:n,1,1

a letter before
chunk:b,t,80 att_cache:12,4,64,128 cnn_cache:12,b,256,7
output:b,t,256 r_att_cache:12,4,64,128 r_cnn_cache:12,b,256,7

whole numbers as state
x:n,39,80 cached_len_0:2,n:i cached_len_1:2,n:i cached_avg_0:2,n,9
encoder_out:n,16,512 new_cached_len_0:2,n:i new_cached_len_1:2,n:i new_cached_avg_0:2,n,9

two layers
x:n,4 h0:n,3 c0:n,3 h1:n,3 c1:n,3
y:n,1 h0_out:n,3 c0_out:n,3 h1_out:n,3 c1_out:n,3

two layers and n
x:n,4 h0:n,3 c0:n,3 h1:n,3 c1:n,3
y:n,1 hn0:n,3 cn0:n,3 hn1:n,3 cn1:n,3

time as a number
x:n,4 h0:n,3 c0:n,3
y:n,1 h1:n,3 c1:n,3

words in one
audioIn:n,80 hiddenIn:n,80 cellIn:n,80
audioOut:n,80 hiddenOut:n,80 cellOut:n,80

data of a state's shape
noisy_spec:n,1,257 enc_buf_0:n,1,257 enc_buf_1:n,1,257
clean_spec:n,1,257 enc_buf_0_updated:n,1,257 enc_buf_1_updated:n,1,257

glued
x:n,3 hin:n,3 cin:n,3
y:n,3 hout:n,3 cout:n,3

words before
input:n,4 hidden_state:n,3 cell_state:n,3
output:n,2 new_hidden_state:n,3 new_cell_state:n,3

a sign behind
x:n,3 h:n,3 c:n,3
y:n,3 h':n,3 c':n,3

keys and values
x:n,1,64 past_key_values.0.key:n,4,32 past_key_values.0.value:n,4,32 past_key_values.1.key:n,4,32
y:n,1,64 present.0.key:n,4,32 present.0.value:n,4,32 present.1.key:n,4,32
"""


def ports_of(text: str) -> list[tuple[str, int, list[Any]]]:
    """`h:2,n,3` is a port h of shape [2, n, 3], of int64 where `:i` follows."""
    found = []
    for port in text.split():
        name, shape, *whole = port.split(":")
        sizes = [int(size) if size.isdigit() else size for size in shape.split(",")]
        found.append((name, TensorProto.INT64 if whole else TensorProto.FLOAT, sizes))
    return found


@pytest.mark.parametrize("graph", WILD.strip().split("\n\n"), ids=lambda graph: graph.partition("\n")[0])
def test_tensors_are_known_by_names_as_they_are_in_the_wild(tmp_path: Path, graph: str) -> None:
    """The first input and output of each are the data, the others are states in order; nothing is asked."""
    inputs, outputs = map(ports_of, graph.splitlines()[1:])
    roles = roles_of(Graph.load(foreign.tangle(tmp_path / "g.onnx", inputs, outputs)), {})
    beside = [name for name, *_ in outputs[1:] if name != "vad_output"]
    assert (roles.input.name, roles.output.name) == (inputs[0][0], outputs[0][0])
    assert [(s.input.name, s.output.name) for s in roles.states] == list(
        zip([i[0] for i in inputs[1:]], beside, strict=True)
    )
    assert (list(roles.questions), list(roles.others)) == ([], [])


def test_a_number_for_all_rows_is_no_state(tmp_path: Path) -> None:
    """A limit of shape [1] and a loudness of shape [1] are not a state and its next value: the limit is asked."""
    inputs = ports_of("input_frame:480 states:45304 limit_db:1")
    outputs = ports_of("enhanced_frame:480 new_states:45304 lsnr:1")
    roles = roles_of(Graph.load(foreign.tangle(tmp_path / "g.onnx", inputs, outputs)), {})
    assert [(s.input.name, s.output.name) for s in roles.states] == [("states", "new_states")]
    assert [question.options for question in roles.questions] == [["--constant limit_db=VALUE"]]
    assert roles.output.name == "enhanced_frame"
