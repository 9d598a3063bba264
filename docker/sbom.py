"""The bill of materials of what is installed: CycloneDX 1.6 as JSON, from the metadata of the environment it runs in.

    python docker/sbom.py > sbom.json

Components are sorted and nothing of time or machine is in it, so the same environment gives the same file. Standard
library only: it runs in the image too.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from typing import Any

PROJECT = "secateur"
SPDX = frozenset(
    ["Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MPL-2.0", "PSF-2.0", "Unlicense", "0BSD", "Zlib"]
)
"""Licences written by their SPDX identifier; other words are given as a name."""


@dataclass(frozen=True)
class Package:
    """What is said of an installed package, read once.

    Args:
        needs: normal names of what it asks for, whatever the platform; extras that nobody asked for included.
    """

    name: str
    version: str
    licences: tuple[str, ...]
    needs: frozenset[str]

    @property
    def purl(self) -> str:
        """Its URL in the sense of package-url: ``pkg:pypi/name@version``."""
        return f"pkg:pypi/{normal(self.name)}@{self.version.replace('+', '%2B')}"


def read(each: Distribution) -> Package:
    """The package of a distribution."""
    data = each.metadata
    words = (re.match(r"[A-Za-z0-9._-]+", line) for line in data.get_all("Requires-Dist") or [])
    needs = frozenset(normal(word[0]) for word in words if word)
    return Package(data["Name"], data["Version"], tuple(licences(each)), needs)


def bill(installed: Iterable[Distribution]) -> dict[str, Any]:
    """The bill of materials of some distributions; what is there twice counts once, as Python would import it."""
    found: dict[str, Package] = {}
    for package in map(read, installed):
        found.setdefault(normal(package.name), package)
    project = found.pop(PROJECT, Package(PROJECT, "0", (), frozenset()))
    packages = [package for _, package in sorted(found.items())]

    def edge(reference: str, package: Package) -> dict[str, Any]:
        return {"ref": reference, "dependsOn": sorted(found[name].purl for name in package.needs if name in found)}

    components = [component(package) for package in packages]
    edges = [edge(PROJECT, project), *(edge(package.purl, package) for package in packages)]
    content = json.dumps([components, edges], sort_keys=True)
    main = {"type": "application", "bom-ref": PROJECT, "name": PROJECT, "version": project.version}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_OID, content).urn,
        "version": 1,
        "metadata": {"component": main},
        "components": components,
        "dependencies": edges,
    }


def component(package: Package) -> dict[str, Any]:
    """One package: name, version, package URL, licences."""
    result: dict[str, Any] = {
        "type": "library",
        "bom-ref": package.purl,
        "name": package.name,
        "version": package.version,
        "purl": package.purl,
    }
    return result | ({"licenses": _choices(package.licences)} if package.licences else {})


def licences(each: Distribution) -> list[str]:
    """What a package says of its licence: an SPDX expression, else classifiers, else the licence field's first line."""
    data = each.metadata
    if expression := data.get_all("License-Expression"):
        return list(expression)
    classifiers = [line.split(" :: ")[-1] for line in data.get_all("Classifier") or [] if line.startswith("License ::")]
    classifiers = [name for name in classifiers if name != "OSI Approved"]
    if classifiers:
        return sorted(classifiers)
    text = "".join(data.get_all("License") or []).strip()
    return [text.splitlines()[0][:100]] if text and text != "UNKNOWN" else []


def _choices(found: tuple[str, ...]) -> list[dict[str, Any]]:
    if len(found) == 1 and re.search(r" (AND|OR|WITH) ", found[0]):
        return [{"expression": found[0]}]
    return [{"license": {"id" if name in SPDX else "name": name}} for name in found]


def normal(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    json.dump(bill(distributions()), sys.stdout, indent=1, ensure_ascii=True)
    sys.stdout.write("\n")
