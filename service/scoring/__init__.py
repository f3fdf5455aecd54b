"""Whole tables stepped through a model without a server: `stepcast score`."""
