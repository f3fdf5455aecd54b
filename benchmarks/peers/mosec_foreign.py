"""mosec on the graph that others made."""

from benchmarks.peers import mosec_app


def serve(port: int, redis: str) -> None:
    """Serve."""
    mosec_app.serve(port, redis, mosec_app.ForeignStep)
