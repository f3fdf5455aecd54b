"""Bytes and status codes: what comes in and goes out. Knows sessions and arrays, never a store or a batch."""
