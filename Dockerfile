# Two images from one file; neither needs the other.
#
#   docker build --target service  -t stepcast-service .                                    onnxruntime on the CPU
#   docker build --target service  -t stepcast-service-gpu --build-arg RUNTIME=service-gpu . onnxruntime on CUDA
#   docker build --target training -t stepcast-training .                                   torch
#
# BASE may be any image with Python >= 3.11, pip and useradd, for example one from your own registry.
ARG BASE=python:3.11-slim

FROM ${BASE} AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
# The one directory that may be written: home, the embedded store, what training makes.
RUN useradd --uid 10001 --user-group --home-dir /data --create-home --shell /usr/sbin/nologin stepcast
WORKDIR /app
# Dependencies before source, so that a change of code installs nothing again: an empty package stands in until the
# source is copied over it (the install is editable).
COPY pyproject.toml constraints.txt ./
RUN mkdir stepcast && touch README.md stepcast/__init__.py


FROM base AS training
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt -e ".[training,tensorboard,word2vec,weather,calendar]"
COPY stepcast stepcast
COPY training training
# Code comes from the image, never from the directory that is mounted on /data.
ENV PYTHONPATH=/app \
    PYTHONSAFEPATH=1
USER 10001:10001
WORKDIR /data
ENTRYPOINT ["python", "-m", "training"]
CMD ["--help"]


FROM base AS service
# An extra of pyproject.toml: service, or service-gpu (needs only the driver and its container toolkit on the host).
ARG RUNTIME=service
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt -e ".[${RUNTIME},grpc,calendar]"
COPY stepcast stepcast
COPY service service
COPY models models
ENV STEPCAST_STORE=sqlite:////data/stepcast.db
USER 10001:10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('STEPCAST_PORT', 8000)), timeout=2); c.request('GET', '/healthz/live'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "service"]
CMD ["serve", "--host", "0.0.0.0"]
