"""import: what torch exports is taken in unaided; a sample of the table in docs/import.md, which a command makes."""

import itertools
from pathlib import Path

import onnx
import pytest
from export_matrix import AXES, EXPORTERS, HEAD, KINDS, NETWORKS, PAGE, SAID_BY_NOBODY, STYLES, Network, export, results

from service.engine.buffers import step_ports
from service.engine.imports.onnx_graphs import import_onnx
from service.engine.model import Runtime
from service.engine.single_step_graph import single_step_graph

SAMPLE = [
    ("TorchScript", "dynamic", Network("LSTM", 2, False), [SAID_BY_NOBODY, "h0, hn", "hx, hy"]),
    ("TorchScript", "dynamic", Network("LSTMCell", 2, True), [SAID_BY_NOBODY, *STYLES]),
    ("TorchScript", "fixed", Network("RNN", 1, True), [SAID_BY_NOBODY, "h, h_new"]),
    ("dynamo", "fixed", Network("GRU", 2, True), [SAID_BY_NOBODY, "h0, h0_out"]),
]


@pytest.mark.parametrize(
    ("exporter", "axes", "network", "styles"), SAMPLE, ids=lambda value: getattr(value, "label", None)
)
def test_what_torch_exports_is_imported_unaided(exporter: str, axes: str, network: Network, styles: list[str]) -> None:
    """Stepped from zero states it answers what torch does."""
    found = dict(results(exporter, axes, network, styles))
    assert list(found) == styles
    for style, result in found.items():
        assert not result.refused, style
        assert result.error < 1e-5, style


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_step_of_what_torch_exports_is_its_recurrent_nodes(tmp_path: Path, exporter: str) -> None:
    """Weights, shapes and moves of axes that exporters put into the graph cost no node of a single step."""
    network = Network("LSTM", 2, True)
    export(network, tmp_path / "g.onnx", dynamo=EXPORTERS[exporter], dynamic=True)
    runtime = Runtime(import_onnx(tmp_path / "g.onnx", tmp_path, "m").directory, device="cpu")
    ports = step_ports(runtime._session, runtime.manifest, {})
    made = single_step_graph(runtime.directory / "model.onnx", ports, None, exact=True)
    assert made is not None
    kinds = [node.op_type for node in onnx.load_from_string(made.model).graph.node]
    assert sorted(kinds) == ["Identity", "LSTM", "LSTM", "Squeeze", "Squeeze"], "the last state is the answer too"
    assert runtime.quicken()


def test_the_table_has_a_line_for_each_row_of_the_matrix() -> None:
    """The page counts twelve ways to name the states of every network; what was refused is explained below it."""
    _, found, rest = PAGE.read_text().partition(HEAD)
    assert found
    lines = rest.partition("\n\n")[0].splitlines()
    assert len(STYLES) + 1 == 12
    for line, (exporter, axes, kind) in zip(lines, itertools.product(EXPORTERS, AXES, KINDS), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:4] == [exporter, axes, kind, str(12 * len(NETWORKS[kind]))], "run python tests/export_matrix.py"
