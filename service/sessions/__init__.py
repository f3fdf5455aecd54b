"""Whose turn it is, numbers, edits. Knows records, engine and the store protocol, never HTTP, JSON or sockets."""
