# An image that runs a run file. The package index is named at build time and stays in the build stage:
#   docker build --build-arg PIP_INDEX_URL=... -t secateur .
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
# Read by pip from the environment of the RUN lines below; unset = pip's own default.
ARG PIP_INDEX_URL
WORKDIR /build
RUN python -m venv /opt/secateur
# The lock first: this layer is built again only when a version changes.
COPY requirements.lock ./
RUN /opt/secateur/bin/python -m pip install --no-cache-dir --disable-pip-version-check -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY device_profiles ./device_profiles
COPY pruning ./pruning
COPY export ./export
COPY pipeline ./pipeline
RUN /opt/secateur/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-deps .

FROM ${PYTHON_IMAGE}
RUN useradd --create-home --uid 10001 secateur \
    && install --directory --owner=secateur --group=secateur /var/lib/secateur /data /app
COPY --from=build /opt/secateur /opt/secateur
COPY pipeline/runs/*.yaml /app/runs/
ENV PATH=/opt/secateur/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SECATEUR_HOME=/var/lib/secateur \
    SECATEUR_DATA=/data
WORKDIR /app
USER secateur
VOLUME ["/var/lib/secateur", "/data"]
# `docker stop` interrupts like Ctrl-C; `secateur resume` continues.
STOPSIGNAL SIGINT
ENTRYPOINT ["secateur"]
CMD ["run", "runs/digits.yaml"]
