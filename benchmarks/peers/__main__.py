"""python -m benchmarks.peers NAME --port P [--redis URL]: serve one of them."""

import argparse
import importlib

NAMES = ("asgi", "websocket", "grpc_echo", "fastapi_echo", "by_hand", "mosec_app", "mosec_foreign", "litserve_app")


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--redis", default="")
    arguments = parser.parse_args()
    importlib.import_module(f"benchmarks.peers.{arguments.name}").serve(arguments.port, arguments.redis)


if __name__ == "__main__":
    main()
