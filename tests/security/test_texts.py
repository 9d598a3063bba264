"""Texts of files, devices and servers: no secrets in them, and nothing that a terminal obeys, on any path."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from secateur.pipeline.cli.texts import harmless, make_logs_harmless
from secateur.pipeline.config.reading import parse_run_file
from secateur.pipeline.config.schema import has_password
from secateur.pipeline.errors import UserError, is_secret, masked
from secateur.pipeline.terminal import Terminal
from tests.pipeline.helpers import TINY, merged

CANARY = "c0ffee-c4n4ry"
NAMES = [
    *("password", "passwd", "PASSWORD", "db_password", "pwd", "secret", "client_secret", "token", "access_token"),
    *("api_key", "apikey", "api-key", "X-Api-Key", "key", "sig", "signature", "X-Amz-Signature", "X-Goog-Credential"),
    *("authorization", "Authorization", "auth", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN", "passphrase", "pass"),
]
FORMS = [
    "https://host/a?{name}={secret}&b=1",
    "https://host/a?b=1&{name}={secret}",
    "https://host/a#{name}={secret}",
    "{name}={secret} and more",
    "{name}='{secret}'",
    '{{"a": 1, "{name}": "{secret}"}}',
    "{{'{name}': '{secret}', 'b': 2}}",
    '{{"{name}":"{secret}"}}',
    '{{"{name}" : "{secret} with words"}}',
    '"{{\\"{name}\\": \\"{secret}\\"}}"',
    "connect({name}={secret})",
    "[('{name}'='{secret}')]",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_value_with_a_telling_name_is_masked(name: str, form: str) -> None:
    text = masked(form.format(name=name, secret=CANARY))
    assert CANARY not in text and "***" in text and name in text


@pytest.mark.parametrize(
    "text",
    [
        f"http://{CANARY}@host/x failed",
        f"HTTPS://{CANARY}@host",
        f"https://user:{CANARY}@host:5000/a",
        f"postgresql+psycopg2://user:{CANARY}@db/mlflow",
        f"https://user:a@{CANARY}@host",
        f"Authorization: Bearer {CANARY}",
        f"authorization: Basic {CANARY}==",
        f"Proxy-Authorization: Token {CANARY}",
        f"{{'Authorization': 'Bearer {CANARY}'}}",
        f"header Bearer {CANARY} was refused",
    ],
)
def test_credentials_of_addresses_and_headers_are_masked(text: str) -> None:
    assert CANARY not in masked(text) and "***" in masked(text)


@pytest.mark.parametrize(
    "text",
    [
        "search.options.key: unknown key; known: a, b",
        "--set: write it as section.key=value, for example --set search.method=random",
        "pi@192.168.1.20 does not answer",
        "monkey=1 and design=2",
        "postgresql://someone@db/mlflow",
        "basic training of 3 epochs",
        "sqlite:////a/b@c.db",
        "line 3: workload.model.name: no network 'x'",
    ],
)
def test_texts_without_secrets_stay(text: str) -> None:
    assert masked(text) == text


SECRETS = st.text("abcXYZ019_-.~", min_size=8, max_size=30).map(lambda text: f"q7{text}Z9")


@given(st.sampled_from(NAMES), st.sampled_from(FORMS), SECRETS, st.text(max_size=20), st.text(" \n;,", max_size=2))
def test_no_secret_is_left_in_any_text(name: str, form: str, secret: str, before: str, between: str) -> None:
    text = masked(f"{before}{between} {form.format(name=name, secret=secret)}")
    assert secret not in text
    assert masked(text).count("***") >= 1


@pytest.mark.parametrize("name", NAMES)
def test_names_that_tell(name: str) -> None:
    assert is_secret(name)
    assert has_password(f"https://host/mlflow?a=1&{name}=x")


@pytest.mark.parametrize(
    "uri", [f"https://{CANARY}@host", f"http://host?sig={CANARY}", f"postgresql://a:{CANARY}@db/m"]
)
def test_an_address_with_credentials_is_refused_with_the_variable_to_use(uri: str) -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_TOKEN") as caught:
        parse_run_file(yaml.safe_dump(merged(TINY, {"tracking": {"uri": uri}})))
    assert CANARY not in str(caught.value)


# ------------------------------------------------------------------------------------------------ control characters

CONTROLS = "\x1b]0;mine\x07\x1b[2J\x9b2J\u202e\r"


def is_harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@given(st.text())
def test_any_text_becomes_harmless(text: str) -> None:
    assert is_harmless(harmless(text))


@pytest.fixture
def _logs() -> Iterator[None]:
    factory, written = logging.getLogRecordFactory(), warnings.formatwarning
    make_logs_harmless()
    yield
    logging.setLogRecordFactory(factory)
    warnings.formatwarning = written


@pytest.mark.usefixtures("_logs")
@pytest.mark.parametrize("logger", ["mlflow.store", "prefect.engine", "anything"])
def test_whatever_handler_writes_it_a_log_is_harmless(logger: str) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    log = logging.getLogger(logger)
    log.disabled, level = (
        False,
        log.level,
    )  # opening a store silences MLflow's
    log.setLevel(logging.ERROR)
    log.addHandler(handler)
    try:
        log.error("%s of %s?token=%s", CONTROLS, "https://host", CANARY)
        log.error(f"{CONTROLS} https://{CANARY}@host")
        try:
            raise RuntimeError(f"{CONTROLS} password={CANARY}")
        except RuntimeError:
            log.exception("it failed")
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert is_harmless(written.getvalue()) and CANARY not in written.getvalue()
    assert "it failed" in written.getvalue() and "RuntimeError" in written.getvalue()


@pytest.mark.usefixtures("_logs")
def test_a_warning_is_harmless() -> None:
    text = warnings.formatwarning(UserWarning(f"{CONTROLS} token={CANARY}"), UserWarning, f"a{CONTROLS}", 1)
    assert is_harmless(text) and CANARY not in text


def test_names_of_an_onnx_file_reach_no_terminal(tmp_path: Path) -> None:
    """A node called like a command to the terminal, in a file that cannot be timed."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3])
    there = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 3])
    node = onnx.helper.make_node(f"No{CONTROLS}Such", ["x"], ["y"], name=f"node{CONTROLS}")
    model = onnx.helper.make_model(onnx.helper.make_graph([node], f"graph{CONTROLS}", [value], [there]))
    (tmp_path / "hostile.onnx").write_bytes(model.SerializeToString())
    for more in ([], ["--debug"]):
        words = [sys.executable, "-m", "secateur", "benchmark", str(tmp_path / "hostile.onnx"), *more]
        found = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert found.returncode != 0
        assert is_harmless(found.stdout) and is_harmless(found.stderr.replace("\t", "")), ascii(found.stderr)


def test_an_error_of_mlflow_reaches_no_terminal() -> None:
    written = io.StringIO()
    Terminal(file=written).labelled("Error", "bold red", masked(f"RESOURCE_DOES_NOT_EXIST: {CONTROLS} token={CANARY}"))
    assert is_harmless(written.getvalue()) and CANARY not in written.getvalue()
