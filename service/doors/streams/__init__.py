"""Streams: entries that are stepped, and what is told of them."""
