"""The SSH target over a network of its own: a namespace behind a slow link that loses packets (root only)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.device_profiles import measure
from tests.device_profiles import sshd
from tests.device_profiles.sshd import Device, opened
from tests.device_profiles.tiny import quick_profile, write_conv

RULES = """
table inet lossy {{
    chain input {{
        type filter hook input priority 0;
        tcp dport {port} numgen random mod 100 < 3 counter drop
    }}
}}
"""


def run(*words: str, given: str | None = None) -> str:
    """Run a command; a machine that cannot do it skips the test."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin", str(sshd.PARTS / "usr/sbin")])
    environment = {**os.environ, "PATH": path, "LD_LIBRARY_PATH": sshd.libraries()}
    done = subprocess.run(words, input=given, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def distant() -> Iterator[Device]:
    """A device behind 20 Mbit/s with 3 % loss towards it."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for tool in ("ip", "tc", "nft"):
        if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin:{sshd.PARTS}/usr/sbin"):
            pytest.skip(f"needs {tool}; tests/tools/install_sshd.sh brings nft")
    name, near, far = f"secateur-{os.getpid()}", f"scn{os.getpid()}", f"scf{os.getpid()}"
    with contextlib.ExitStack() as stack:
        run("ip", "netns", "add", name)
        stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)  # takes the link with it
        run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        run("ip", "addr", "add", f"{sshd.FAR_HOST}/30", "dev", near)
        run("ip", "link", "set", near, "up")
        run("ip", "-n", name, "addr", "add", f"{sshd.FAR_DEVICE}/30", "dev", far)
        run("ip", "-n", name, "link", "set", far, "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
        for where in (["tc"], ["tc", "-n", name]):
            run(*where, "qdisc", "add", "dev", far if "-n" in where else near, *"root tbf rate 20mbit".split(),
                *"burst 32kbit latency 400ms".split())  # fmt: skip
        folder = stack.enter_context(sshd.public_folder())
        device = sshd.start_device(folder, wrap=["ip", "netns", "exec", name])
        stack.callback(device.close)
        run("ip", "netns", "exec", name, "nft", "-f", "-", given=RULES.format(port=device.port))
        yield device
        assert sshd.wait_for(lambda: not device.agents())
        counted = run("ip", "netns", "exec", name, "nft", "list", "ruleset")
        assert "packets 0 " not in counted  # something was lost


@pytest.mark.long
def test_measuring_over_a_slow_link_that_loses_packets(distant: Device, tmp_path: Path):
    models = {"dense": write_conv(tmp_path / "a.onnx", 8), "pruned": write_conv(tmp_path / "b.onnx", 4)}
    large = tmp_path / "large.onnx"
    large.write_bytes(os.urandom(2_000_000))
    with opened(distant.settings()) as target:
        assert target.prepare()["device"]
        assert Path(target.put(large)).read_bytes() == large.read_bytes()
        result = measure(target, quick_profile(), models)
    assert 0 < result.ratio("pruned", "dense").value < 100
