# An image that runs run files, flows and workers. docs/how-to/image.md has the build arguments and what was checked.
#   docker build -t secateur .
#   docker build -t secateur:cpu --build-arg TORCH=cpu --build-arg TORCH_INDEX_URL=... .
# A tag can be moved, a digest cannot; `make pin` writes it anew.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

FROM ${PYTHON_IMAGE} AS build
# Read by pip from the environment of the RUN lines below; unset = pip's own default. It stays in this stage.
ARG PIP_INDEX_URL
# cuda = torch as in the lock, with NVIDIA's libraries (several GB); it runs on CPUs too.
# cpu = the same version from TORCH_INDEX_URL, an index of builds without CUDA.
ARG TORCH=cuda
ARG TORCH_INDEX_URL=
# Of pyproject.toml, separated by commas: postgres, server (PostgreSQL and passwords for MLflow), dask, ray.
ARG EXTRAS=postgres
WORKDIR /build
RUN python -m venv /opt/secateur
ENV PATH=/opt/secateur/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# Dependencies first: these layers are built again only when a version changes. The lock constrains, so that the image
# holds what the extras need and nothing of what only developers do. Wheels only, and no isolation for the build of the
# project itself: what would build a package is chosen by nobody but the lock.
COPY docker/wanted.py requirements.lock pyproject.toml ./
RUN python wanted.py --torch "$TORCH" --index "$TORCH_INDEX_URL" \
    && if [ "$TORCH" = cpu ]; then \
        python -m pip install --no-deps --only-binary :all: --index-url "$TORCH_INDEX_URL" -r torch.txt; \
    fi
RUN python wanted.py --extras "$EXTRAS" \
    && python -m pip install --only-binary :all: -c requirements.lock -r wanted.txt
COPY README.md LICENSE ./
COPY secateur ./secateur
COPY device_profiles ./device_profiles
COPY pruning ./pruning
COPY export ./export
COPY pipeline ./pipeline
# `pip check` would object to a build of torch without its CUDA packages only if it asked for them: it does not.
RUN python -m pip install --no-deps --no-build-isolation . \
    && python -m pip check
COPY docker/sbom.py ./
RUN python sbom.py > /opt/secateur/sbom.json

FROM ${PYTHON_IMAGE}
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Secateur" \
    org.opencontainers.image.description="Prunes a PyTorch vision model until it fits a device, with measured latency" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision="${REVISION}"
# All that is ever written lies in the home, which is a volume; the rest may be read-only (with a tmpfs on /tmp).
RUN groupadd --gid 10001 secateur \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/secateur secateur \
    && install --directory --owner=10001 --group=10001 --mode=0750 /var/lib/secateur \
    && install --directory /data /app
COPY --from=build /opt/secateur /opt/secateur
COPY pipeline/runs/*.yaml /app/runs/
COPY docker/health.py docker/accounts.py /app/
ENV PATH=/opt/secateur/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/lib/secateur \
    SECATEUR_HOME=/var/lib/secateur \
    SECATEUR_DATA=/data \
    PREFECT_HOME=/var/lib/secateur/prefect \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1
WORKDIR /app
# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
VOLUME ["/var/lib/secateur", "/data"]
# `docker stop` interrupts like Ctrl-C; `secateur resume` continues.
STOPSIGNAL SIGINT
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["python", "/app/health.py"]
ENTRYPOINT ["secateur"]
CMD ["run", "runs/digits.yaml"]
