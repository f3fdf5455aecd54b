"""FastAPI + onnxruntime + Redis as one writes it in an afternoon: GET the state, run, SET it, per request."""

from fastapi import FastAPI
from pydantic import BaseModel
from redis.asyncio import Redis

from benchmarks.peers.common import EMPTY, Stepper, run_uvicorn


class Step(BaseModel):
    """The body of a step."""

    inputs: list[float]


class Answer(BaseModel):
    """And its answer."""

    outputs: list[float]


def make(url: str) -> FastAPI:
    """The application."""
    app, redis, stepper = FastAPI(openapi_url=None), Redis.from_url(url), Stepper()

    @app.post("/step/{session}")
    async def step(session: str, body: Step) -> Answer:
        before = await redis.get(f"hand:{session}")
        outputs, (after,) = stepper.step([body.inputs], [before or EMPTY])  # type: ignore[list-item]
        await redis.set(f"hand:{session}", after)
        return Answer(outputs=outputs[0].tolist())

    return app


def serve(port: int, redis: str) -> None:
    """Serve."""
    run_uvicorn(make(redis), port)
