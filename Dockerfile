# Two images of one project:
#   docker build --target api    -t seuf-api .       API, dispatcher, migrations: no torch
#   docker build --target worker -t seuf-worker .    Celery worker and its engine process
#
# TORCH_INDEX_URL has no default. Left out, torch comes from pip's own index: on x86_64 that build holds CUDA and also
# runs on a machine without a GPU, only larger. Give the address of an index of CPU builds for a small worker image, or
# of another CUDA release. PYTHON_IMAGE takes a digest or a mirror.

ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SEUF_DATA_DIR=/data \
    SEUF_LOG_FORMAT=json \
    HOME=/tmp
# Everything that runs writes to /data and /tmp only, so the root file system can be read-only.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin seuf \
    && install --directory --owner=seuf --group=seuf /data
VOLUME /data

FROM base AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY api api
COPY cli cli
COPY client client
COPY migrations migrations
COPY seuf_core seuf_core
COPY store store
COPY telemetry telemetry
COPY worker worker
RUN pip wheel --no-deps --wheel-dir /wheel .

FROM base AS build
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/venv
COPY pyproject.toml requirements.lock ./
COPY scripts/image_requirements.py scripts/

FROM build AS build-api
# The lock as a constraint: its versions, but none of its test tools.
RUN --mount=type=cache,target=/var/cache/pip \
    python scripts/image_requirements.py edge > wanted.txt \
    && pip install --constraint requirements.lock --requirement wanted.txt
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps /wheel/*.whl

FROM build AS build-worker
# torch first and alone, from the index that was asked for: nothing after it can pull in another build.
ARG TORCH_INDEX_URL
RUN --mount=type=cache,target=/var/cache/pip \
    pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' requirements.lock)"
RUN --mount=type=cache,target=/var/cache/pip \
    python scripts/image_requirements.py engine > wanted.txt \
    && pip install --constraint requirements.lock --requirement wanted.txt
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps /wheel/*.whl

FROM base AS worker
# No model hub is ever asked: models are registered folders.
ENV HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
COPY --from=build-worker /opt/venv /opt/venv
USER seuf
WORKDIR /data
HEALTHCHECK --interval=60s --timeout=30s --start-period=60s --retries=3 \
    CMD ["sh", "-c", "celery --quiet -A worker.app inspect ping --destination celery@$(hostname) --timeout 10"]
CMD ["celery", "--quiet", "-A", "worker.app", "worker", "--concurrency", "1", "--prefetch-multiplier", "1"]

FROM base AS api
COPY --from=build-api /opt/venv /opt/venv
USER seuf
WORKDIR /data
EXPOSE 8321
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8321/healthz', timeout=4)"]
CMD ["uvicorn", "api.main:app", "--host", "0.0.0.0", "--port", "8321", "--no-server-header", "--timeout-graceful-shutdown", "20"]
