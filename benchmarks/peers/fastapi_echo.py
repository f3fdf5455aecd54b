"""FastAPI doing nothing: the body through Request, and a body of the same fields through pydantic."""

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from benchmarks.peers.common import run_uvicorn

app = FastAPI(openapi_url=None)


class Step(BaseModel):
    """The body of a step."""

    inputs: list[float]
    seq: int | None = None


@app.post("/request")
async def request(request: Request) -> Response:
    """The body as it came."""
    return Response(await request.body(), media_type="application/json")


@app.post("/pydantic")
async def pydantic(step: Step) -> Step:
    """The body, decoded, checked and encoded."""
    return step


def serve(port: int, _: str) -> None:
    """Serve."""
    run_uvicorn(app, port)
