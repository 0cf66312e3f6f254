# The proxy as an image: Python, one virtual environment, a user without rights. No compiler, no pip, no server
# of its own for the cache: redis.url has to be set, else `serve` ends with status 2 and says so.
#
#   docker build --tag snapshot-proxy:0.1.0 .

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# `fast,otel` for tracing, which OTEL_… variables then turn on.
ARG EXTRAS=fast
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY proxy ./proxy
# Wheels only, but for the proxy itself: nothing that would need a compiler.
RUN python -m venv --without-pip /opt/snapshot-proxy \
 && python -m pip --python /opt/snapshot-proxy/bin/python install --no-cache-dir \
    --only-binary :all: --constraint constraints.txt ".[${EXTRAS}]"

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="snapshot-proxy" \
      org.opencontainers.image.description="A caching read-through proxy for DigitalOcean's snapshot API" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"

# tini is process 1: it passes signals on, also before Python listens to them, and waits for orphans (of
# `docker exec`, for one). The directory is for secrets: an empty volume mounted on it takes over owner and mode.
# hadolint ignore=DL3008 # the base image pins the release of Debian, which has one version of tini
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && python -m pip uninstall --yes --root-user-action ignore pip setuptools wheel \
 && groupadd --gid 10001 snapshot-proxy \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin snapshot-proxy \
 && install -d -o 10001 -g 10001 -m 0700 /var/lib/snapshot-proxy
COPY --from=build /opt/snapshot-proxy /opt/snapshot-proxy

ENV PATH=/opt/snapshot-proxy/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SNAPSHOT_PROXY_SERVER__HOST=0.0.0.0 \
    SNAPSHOT_PROXY_ADMIN__HOST=0.0.0.0
USER 10001:10001
EXPOSE 8080 8081
STOPSIGNAL SIGTERM
# The command gives up after 10 s and says why: a replica that is slow under load lives. Three times make it unhealthy.
HEALTHCHECK --interval=10s --timeout=12s --start-period=10s --retries=3 CMD ["snapshot-proxy", "healthcheck"]
ENTRYPOINT ["tini", "-s", "--", "snapshot-proxy"]
CMD ["serve"]
