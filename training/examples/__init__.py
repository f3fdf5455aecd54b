"""Data sources of the worked examples: generated from formulas, so that they need no download."""
