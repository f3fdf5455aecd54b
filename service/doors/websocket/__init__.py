"""The native WebSocket API."""
