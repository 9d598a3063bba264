"""The codec of a journal's records: requests, candidates, evaluations and arrays as JSON, and back.

A record says which request it answers (``request``, the digest of its identity), what of it is worth reading, and the
answer. Records of formats 2 and 3 have another ``request`` or none; everything else in them is read in the same way.
A training that the budget shortened has ``trained``, its true epochs, beside those that were asked for.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from secateur.pipeline.run.journal import Record
from secateur.pruning.plan import PruningPlan
from secateur.pruning.search.identity import KINDS, digest_of
from secateur.pruning.search.protocol import (
    AuxiliaryTraining,
    Candidate,
    Evaluate,
    Evaluation,
    FineTune,
    Request,
    Score,
)


def heading(request: Request) -> dict[str, Any]:
    """What a record says of the request that it answers: its kind, its identity, and what is worth reading."""
    return {"kind": KINDS[type(request)], "request": digest_of(request), **_told(request)}


def heading_of_exact(candidate: Candidate, precision: str = "fp32") -> dict[str, Any]:
    """The same, of a candidate's accuracy by itself, which no request of a strategy's asks for."""
    told = {"kind": "exact", "request": digest_of(Evaluate((candidate,))), "candidate": describe(candidate)}
    return told if precision == "fp32" else {**told, "precision": precision}


def _told(request: Request) -> dict[str, Any]:
    match request:
        case Evaluate((candidate,), latency):
            return {"latency": latency, "candidate": describe(candidate)}
        case FineTune(candidate, epochs, part, write_back, distill, latency):
            told = {"epochs": epochs, "part": list(part), "write_back": write_back, "distill": distill}
            later = {"lr": request.lr, "quantise": request.quantise or None}
            told |= {name: value for name, value in later.items() if value is not None}
            return {**told, "latency": latency, "candidate": describe(candidate)}
        case AuxiliaryTraining(kind, epochs, base, options):
            return {"learning": kind, "epochs": epochs, "base_of": base, "options": dict(options)}
        case Score(criterion):
            return {"criterion": criterion}
    return {}


def request_of(record: Record) -> FineTune | AuxiliaryTraining:
    """The request that a record of a training answers, with the epochs that were trained."""
    epochs = record.get("trained", record["epochs"])
    if record["kind"] == "learn":
        return AuxiliaryTraining(record["learning"], epochs, record["base_of"], record["options"])
    start, end = record["part"]
    more = {name: record[name] for name in ("write_back", "distill", "latency", "lr", "quantise") if name in record}
    return FineTune(to_candidate(record["candidate"]), epochs, (start, end), **more)


def of_candidates(records: Iterable[Record]) -> list[Record]:
    """The records that evaluate a candidate; an auxiliary training has an evaluation too, and no candidate."""
    return [record for record in records if "evaluation" in record and "candidate" in record]


def pack(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays as JSON: shape, and zlib-compressed float32 in base64."""
    return {
        name: [list(array.shape), base64.b64encode(zlib.compress(array.astype("<f4").tobytes())).decode()]
        for name, array in arrays.items()
    }


def unpack(data: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of ``pack``, as float64."""
    return {
        name: np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<f4").reshape(shape).astype(np.float64)
        for name, (shape, text) in data.items()
    }


def describe(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON; ``plan`` is the text of ``PruningPlan.to_json``, ``projected_share`` stands where not 0."""
    told = {
        "id": candidate.id,
        "plan": candidate.plan.to_json(),
        "digest": candidate.plan.digest,
        "origin": candidate.origin,
        "parents": list(candidate.parents),
        "base": candidate.base,
    }
    return {**told, "projected_share": candidate.projected_share} if candidate.projected_share else told


def to_candidate(data: Mapping[str, Any]) -> Candidate:
    """The inverse of ``describe``."""
    plan = PruningPlan.from_json(data["plan"])
    parents, share = tuple(data["parents"]), data.get("projected_share", 0.0)
    return Candidate(data["id"], plan, data["origin"], parents, data["base"], share)


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON; the forward pass where it is known, the precision where it is not the only one, fp32."""
    data = {"status": evaluation.status, "reason": evaluation.reason, "metrics": dict(evaluation.metrics)}
    told: dict[str, Any] = {"forward": evaluation.forward} if evaluation.forward else {}
    if evaluation.precision != "fp32" or evaluation.scored != 1:
        told |= {"precision": evaluation.precision, "scored": evaluation.scored}
    return {**data, **told}


def to_evaluation(data: Mapping[str, Any]) -> Evaluation:
    """The inverse of ``to_dict``."""
    precision, scored = data.get("precision", "fp32"), data.get("scored", 1)
    return Evaluation(data["status"], data["reason"], data["metrics"], data.get("forward", ""), precision, scored)
