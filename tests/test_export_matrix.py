"""import: what torch exports is taken in unaided; a sample of the table in docs/import.md, which a command makes."""

import itertools

import pytest
from export_matrix import AXES, EXPORTERS, HEAD, KINDS, NETWORKS, PAGE, SAID_BY_NOBODY, STYLES, Network, results

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


def test_the_table_has_a_line_for_each_row_of_the_matrix() -> None:
    """The page counts twelve ways to name the states of every network; what was refused is explained below it."""
    _, found, rest = PAGE.read_text().partition(HEAD)
    assert found
    lines = rest.partition("\n\n")[0].splitlines()
    assert len(STYLES) + 1 == 12
    for line, (exporter, axes, kind) in zip(lines, itertools.product(EXPORTERS, AXES, KINDS), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:4] == [exporter, axes, kind, str(12 * len(NETWORKS[kind]))], "run python tests/export_matrix.py"
