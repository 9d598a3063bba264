"""One of each kind of thing that is added in one file, as somebody else would write it."""

METHOD = '''"""Mine: every group keeps the same share of its channels."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.pruning.search.protocol import Candidate, Problem, Strategy
from secateur.pruning.search.support import best_first, evaluate, score


@dataclass(frozen=True)
class Options:
    """Options of my method.

    Args:
        shares: of the channels that stay, one plan each.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    shares: tuple[float, ...] = (0.75, 0.5)


def search(problem: Problem, options: Options) -> Strategy:
    """One plan a share."""
    saliency = yield from score("l1")
    space = problem.space
    widths = [[space.snap(name, share * space.sizes[name]) for name in space.names] for share in options.shares]
    candidates = [Candidate(i, space.decode(row, saliency), "mine") for i, row in enumerate(widths)]
    evaluations = yield from evaluate(candidates, latency=True)
    return best_first(problem, candidates, evaluations)
'''

TARGET = '''"""A board on this bench: the local machine under another name."""

from pydantic import BaseModel, ConfigDict

from secateur.device_profiles.runtime import runtime_of
from secateur.device_profiles.target import AddOption
from secateur.device_profiles.targets.local import LocalTarget

ADD_OPTIONS = (AddOption("serial", "NUMBER", "What stands on its label.", lambda text: {"serial": text}, "A1"),)
THIS_MACHINE = True


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    serial: str


def address(connect):
    return "board " + str(connect.get("serial"))


def open_target(profile, settings):
    return LocalTarget(runtime=runtime_of(profile))
'''

RUNTIME = '''"""ONNX Runtime on files that are packed."""

import gzip

FORMAT = "{format}"


def facts():
    import onnxruntime

    return {{"version": "1.0", "providers": ["CPUExecutionProvider"]}}


def load(path, threads, provider):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with gzip.open(path) as file:
        return onnxruntime.InferenceSession(file.read(), options, providers=[provider])


def inputs(session):
    return [(i.name, list(i.shape), "float32") for i in session.get_inputs()]


def outputs(session):
    return [output.name for output in session.get_outputs()]


def run(session, feeds):
    return session.run(None, feeds)
'''

FORMAT = '''"""ONNX, packed."""

import gzip

SUFFIX = ".gz"


def write(source, to):
    to.write_bytes(gzip.compress(source.read_bytes(), mtime=0))
'''
