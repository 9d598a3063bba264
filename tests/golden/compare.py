"""Does a redesign leave every result as it was? ``make golden BASE=commit`` asks two checkouts on one machine.

The base commit, in a git worktree of its own, and the checkout that this file lies in perform the run files of
``runs/``, one after the other: each by its own command line, in a process and a home of its own, with the same
packages, seeds and one thread. What they left in their run directories is compared by meaning:

- the requests of the search in the order they were asked, and what was answered (accuracies, losses, MACs, parameters);
- the digests of the candidates' plans, in that order too;
- the weights, by the SHA-256 of the tensors: of the baseline, of all trainings of the search, of the compact network;
- the plan chosen, the ONNX files, what both networks reach on the test split, and the exit code of the run.

Times, latencies, sizes of files, paths, digests of the configuration and of requests (they are made from names) do not
count, nor does whether a field at its default is written down. Nothing in these runs is decided by a latency.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUNS = ("evolution", "supernet", "detector")
RENAMED = {"judge": "gate"}
"""Old word -> new word, of keys and of kinds in the files of a run: a redesign that renames one adds a line here."""
NOISE = re.compile(r"time|seconds|line|crc|plan|request|checkpoint|.+_ms|.+_bytes|.+_mj|latency_.+")
"""Keys that say when, how fast, where, or what is said by another key."""
DEFAULTS: Mapping[str, Any] = {"part": [0.0, 1.0]}
"""Values of fields, besides none, false and empty, that may be left out as well."""
MOST_SHOWN = 5
Facts = dict[str, Any]
Results = dict[str, Facts]
"""Run and what was looked at -> the place of a value in it -> the value."""


class GoldenError(Exception):
    """The comparison could not be made."""


def facts(value: Any, weights: Mapping[str, str], place: str = "") -> Iterator[tuple[str, Any]]:
    """What a JSON value means: the places of its values (``evaluation.metrics.top1``), and the values, in new words.

    Args:
        weights: name of trained weights -> digest, which stands for that name.
        place: of the value itself.
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            key = RENAMED.get(key, key)
            if not NOISE.fullmatch(key) and part != DEFAULTS.get(key):
                yield from facts(part, weights, f"{place}.{key}".lstrip("."))
    elif isinstance(value, str):
        if value:
            yield place, weights.get(value, RENAMED.get(value, value))
    elif value is not None and value is not False and value != []:
        yield place, value


def digest_of(file: Path) -> str:
    """SHA-256 of the tensors in a file of weights: their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def results(directory: Path) -> Results:
    """What a run left behind; one that failed at its end has no report."""
    trained = {file.stem: digest_of(file) for file in sorted(directory.glob("*/**/*.safetensors"))}
    whole = {file.stem: digest_of(file) for file in sorted(directory.glob("*.safetensors"))}
    found: Results = {"requests": {}, "plan digests": {}, "answers": {}, "weights": whole}
    lines = (directory / "journal.jsonl").read_text(encoding="utf-8").splitlines()[1:]  # without the header
    for number, line in enumerate(lines, start=1):
        for place, value in facts(json.loads(line), trained):
            found[row_of(place, value, trained)][f"{number}.{place}"] = value
    plan = json.loads((directory / "compact.plan.json").read_text(encoding="utf-8"))
    found["chosen plan"] = dict(facts(plan["groups"], {}))
    found["ONNX files"] = {file.name: sha256_of(file) for file in sorted(directory.glob("*.onnx"))}
    if (directory / "report.json").exists():
        report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        reached = {place: value for place, value in facts(report["facts"], {}) if place.startswith("gate.models.")}
        found["test split"] = reached
    return found


def row_of(place: str, value: Any, weights: Mapping[str, str]) -> str:
    """Under which heading a value of the journal is compared."""
    if place.endswith("digest"):
        return "plan digests"
    if value in weights.values():
        return "weights"
    return "answers" if {"metrics", "scores"} & set(place.split(".")) else "requests"


def perform(checkout: Path, folder: Path) -> Results:
    """Run every run file with the code of a checkout, in a folder of its own.

    Raises:
        GoldenError: other code was imported, or a run did not get as far as a compact network.
    """
    shutil.copytree(HERE / "runs", folder)
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    env |= {"SECATEUR_HOME": str(folder), "PREFECT_HOME": str(folder / "prefect"), "SECATEUR_LOCKS": str(folder)}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)

    program = "secateur" if (checkout / "secateur").is_dir() else "pipeline"  # as it was called before it had one name
    origin = python("-c", f"from importlib.util import find_spec; print(find_spec({program!r}).origin)").stdout.strip()
    if not Path(origin).is_relative_to(checkout):
        raise GoldenError(f"{checkout} imports other code than its own: {origin}")
    found: Results = {}
    for name in RUNS:
        started = time.monotonic()
        ended = python("-m", program, "run", f"{name}.yaml")
        directories = list((folder / "runs").glob(f"{name}-*/compact.plan.json"))
        if not directories:
            raise GoldenError(f"{checkout}: run {name} failed:\n{(ended.stdout + ended.stderr)[-3000:]}")
        print(f"  {name}: exit code {ended.returncode} after {time.monotonic() - started:.0f} s", flush=True)
        told = results(directories[0].parent) | {"exit code": {"": ended.returncode}}
        found |= {f"{name}: {what}": values for what, values in told.items()}
    return found


def differences(base: Facts, here: Facts) -> list[str]:
    """One line for every place whose value differs, in the base's order."""
    missing = "nothing"
    return [
        f"{place}: {base.get(place, missing)!s:.70} -> {here.get(place, missing)!s:.70}"
        for place in {**base, **here}
        if base.get(place, missing) != here.get(place, missing)
    ]


def report(base: Results, here: Results) -> bool:
    """Print the table of what is equal and what differs; returns whether all is equal."""
    same = True
    for what in {**base, **here}:
        found = differences(base.get(what, {}), here.get(what, {}))
        values = len({**base.get(what, {}), **here.get(what, {})})
        verdict = f"{len(found)} DIFFER" if found else "equal" if values else "NOTHING FOUND"
        print(f"{what:28}{values:>6} values  {verdict}")
        for line in found[:MOST_SHOWN]:
            print(f"    {line}")
        same &= verdict == "equal"
    return same


def git(*arguments: str) -> str:
    """What git says about this checkout.

    Raises:
        GoldenError: it refuses.
    """
    ended = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise GoldenError(f"git {' '.join(arguments)}: {ended.stderr.strip()}")
    return ended.stdout.strip()


def compare(base: str) -> bool:
    """Run the base commit and this checkout, and print what differs; returns whether nothing does.

    Raises:
        GoldenError: there is no such commit, or a run failed.
    """
    commit = git("rev-parse", "--verify", f"{base}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="secateur-golden-") as name:
        folder = Path(name).resolve()
        git("worktree", "add", "--detach", str(folder / "base"), commit)
        try:
            print(f"base: {git('log', '-1', '--format=%h %s', commit)}", flush=True)
            before = perform(folder / "base", folder / "base-runs")
            print(f"here: {git('log', '-1', '--format=%h %s')}, with what is not committed", flush=True)
            return report(before, perform(ROOT, folder / "here-runs"))
        finally:
            git("worktree", "remove", "--force", str(folder / "base"))


def main() -> int:
    """0 = all is equal, 1 = something differs, 2 = the comparison could not be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HEAD~1", help="the commit to compare with (default: the one before)")
    try:
        return 0 if compare(parser.parse_args().base) else 1
    except GoldenError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
