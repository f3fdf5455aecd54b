"""The server: turns many one-step questions into few batched runs, and remembers each session."""
