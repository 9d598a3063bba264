"""PASCAL VOC, and folders like it: pairs of an XML file and an image."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast
from xml.etree import ElementTree
from xml.parsers import expat

from secateur.device_profiles.wording import number_of
from secateur.pipeline.config.faults import known
from secateur.pipeline.errors import UserError
from secateur.pipeline.workloads.data import splits
from secateur.pipeline.workloads.data.content import Damaged, Reading
from secateur.pipeline.workloads.data.listing import folders_in, is_hidden, is_image, parts_of, role_of
from secateur.pipeline.workloads.data.notes import Tally, some
from secateur.pipeline.workloads.data.paths import find_folder, read_text
from secateur.pipeline.workloads.data.scenes import (
    SEARCH_FRACTION,
    Corners,
    FileScenes,
    Scene,
    SceneData,
    Truth,
    assemble,
    divide,
    usable,
    whole_number,
)

UNLISTED = "annotation(s) is|are in no list and was|were not used"
KEYS, NEEDS = ("path", "years", "classes", "official_splits", "damaged"), ("path",)
LINE = " line"
"""Attribute that holds the line of an XML element; no attribute in a file can have this name."""


def looks_like(path: Path) -> str | None:
    """What is seen where a path is a VOC devkit, or a folder of XML files and images."""
    if not path.is_dir():
        return None
    if any(path.glob("VOCdevkit/VOC2*/Annotations")) or any(path.glob("VOC2*/Annotations")):
        return "a PASCAL VOC devkit"
    parts, _ = parts_of(path)
    for folder in (path, *parts.values()):
        annotations, _ = _homes(folder)
        if annotations is not None and any(annotations.glob("*.xml")):
            return "VOC annotations (XML)"
    return None


def load_scenes(options: Any, reading: Reading) -> SceneData:
    """The same as ``load``, of a ``data`` section.

    Raises:
        UserError: as ``load``.
    """
    o = options
    shares = (o.search_fraction, o.test_fraction)
    return load(o.path, o.years, o.classes, o.official_splits, *shares, o.damaged, reading)


def load(
    path: str,
    years: tuple[str, ...] | None,
    classes: tuple[str, ...] | None,
    official: bool,
    search_fraction: float | None,
    test_fraction: float,
    damaged: Damaged,
    reading: Reading,
) -> SceneData:
    """The annotated images of a folder, split by its lists where there are any.

    Args:
        path: the folder that holds VOCdevkit/, or ImageSets/, JPEGImages/ and Annotations/, or pairs of XML and image.
        years: which folders VOCdevkit/VOC{year} are used together; None = all.
        classes: names in the order of their indices; None = those annotated, sorted.
        official: whether the lists in ImageSets/Main (or the folders of the splits) are followed.
        search_fraction: share of the training images; None = the list ``val`` beside ``test``, else 0.1.
        test_fraction: share of all images, where there is no list for the test.

    Raises:
        UserError: see ``secateur.pipeline.workloads.data.scenes``.
    """
    scenes, lists, tally = _read(path, years, official)
    scenes, seen, index = usable(scenes, damaged, reading, tally)
    lists = {name: [index[i] for i in part if i in index] for name, part in lists.items()}
    given, shares = _splits(len(scenes), lists, search_fraction, test_fraction, tally)
    return divide(assemble(scenes, seen, classes, tally, chosen=classes is not None), given, shares, tally)


def open_all(
    path: str, years: tuple[str, ...] | None, official: bool, classes: tuple[str, ...] | None, reading: Reading
) -> FileScenes:
    """All annotated images, in order and without splits."""
    scenes, _, tally = _read(path, years, official)
    scenes, seen, _ = usable(scenes, "refuse", reading, tally)
    return assemble(scenes, seen, classes, tally, chosen=classes is not None)


def _splits(
    num: int, lists: Mapping[str, list[int]], search_fraction: float | None, test_fraction: float, tally: Tally
) -> tuple[dict[str, list[int]], dict[str, float]]:
    """(splits as far as the official lists give them, shares of those that have to be drawn)."""
    val = set(lists.get("val", ()))
    rest = {*lists.get("trainval", ()), *lists.get("train", ()), *val} if lists else set(range(num))
    search = search_fraction or SEARCH_FRACTION
    both = bool(val) and len(val) < len(rest)
    if lists.get("test"):
        if both and search_fraction is None:
            return {"train": sorted(rest - val), "search": sorted(val), "test": lists["test"]}, {}
        return {"train": sorted(rest), "test": lists["test"]}, splits.shares_of(None, search)
    if both:
        tally.say(f"{number_of(len(val), 'image(s)')} of the list val serve as test split, as there is no list test")
        return {"train": sorted(rest - val), "test": sorted(val)}, splits.shares_of(None, search)
    return {"train": sorted(rest)}, splits.shares_of(test_fraction, search)


def _read(path: str, years: tuple[str, ...] | None, official: bool) -> tuple[list[Scene], dict[str, list[int]], Tally]:
    """(annotated images, indices of each official list, what was found on the way)."""
    root, tally = find_folder(path, "folder of images and annotations"), Tally()
    pairs: dict[Path, Path] = {}  # annotation -> image
    lists: dict[str, list[Path]] = {}
    for folder in _homes_of(root, years):
        for name, listed in _listed(folder, official, tally):
            pairs |= listed
            if name is not None:
                lists.setdefault(name, []).extend(listed)
    if not pairs:
        raise UserError(
            f"no annotated images under {root}; expected VOCdevkit/VOC2007, or ImageSets/Main, JPEGImages and "
            "Annotations, or XML files beside images, or the folders images and annotations"
        )
    order = {annotation: index for index, annotation in enumerate(sorted(pairs))}
    both = sorted({a for name, part in lists.items() if name != "test" for a in part} & set(lists.get("test", ())))
    if both:
        raise UserError(
            f"{root}: {number_of(len(both), 'image(s) is|are')} listed for test and for training too: "
            f"{some([a.stem for a in both])}; "
            "remove them from one list, or set official_splits: false"
        )
    if lists:
        unused = set(pairs).difference(*lists.values())
        tally.add(UNLISTED, *sorted(annotation.name for annotation in unused))
    scenes = [_scene(annotation, pairs[annotation], root) for annotation in order]
    return scenes, {name: sorted({order[a] for a in part}) for name, part in lists.items()}, tally


def _homes_of(root: Path, years: tuple[str, ...] | None) -> list[Path]:
    """The folders that hold images and annotations: one for each year, or ``root`` itself."""
    kit = next((folder for folder in (root / "VOCdevkit", root) if any(folder.glob("VOC2*/Annotations"))), None)
    if kit is None:
        if years is not None:
            raise UserError(f"{root} has no folders VOCdevkit/VOC{{year}}; correct the path or leave years out")
        return [root]
    there = {folder.parent.name.removeprefix("VOC"): folder.parent for folder in sorted(kit.glob("VOC2*/Annotations"))}
    for year in years or ():
        if year not in there:
            raise UserError(f"{kit} has no folder VOC{year}; {known(list(there), year)}")
    return [there[year] for year in years or there]


def _listed(folder: Path, official: bool, tally: Tally) -> Iterator[tuple[str | None, dict[Path, Path]]]:
    """Official lists with their annotations and images; without lists (None, everything there is)."""
    annotations, pictures = _homes(folder)
    if annotations is None:
        parts, _ = parts_of(folder)
        for name, part in parts.items():
            for _, listed in _listed(part, False, tally):
                yield name if official else None, listed
        return
    images = _images_by_stem(pictures)
    all_annotations = {path.stem: path for path in sorted(annotations.glob("*.xml")) if not is_hidden(path.name)}
    lists = {name: _stems(file, all_annotations) for name, file in _lists_in(folder)} if official else {}
    unused = set(all_annotations).difference(*lists.values()) if lists else set()
    tally.add(UNLISTED, *(all_annotations[stem].name for stem in sorted(unused)))
    home = {annotation: images.get(stem, pictures / f"{stem}.jpg") for stem, annotation in all_annotations.items()}
    for split, stems in lists.items():
        yield split, {all_annotations[stem]: home[all_annotations[stem]] for stem in stems}
    if not lists:
        yield None, home
        bare = [images[stem].name for stem in sorted(set(images) - set(all_annotations))]
        tally.add("image(s) without an annotation file was|were not used", *bare)


def _lists_in(folder: Path) -> list[tuple[str, Path]]:
    """(split, file) of the lists that a folder has; those of single classes and unknown names are no splits."""
    main = folder / "ImageSets" / "Main"
    files = sorted(main.glob("*.txt")) if main.is_dir() else []
    found = [(role_of(file.stem) or file.stem.lower(), file) for file in files if not is_hidden(file.name)]
    chosen = [(name, file) for name, file in found if name in ("train", "val", "trainval", "test")]
    twice = [file for name, file in chosen if [n for n, _ in chosen].count(name) > 1]
    if twice:
        raise UserError(f"{main} has the lists {' and '.join(f.name for f in twice)}: keep one of them")
    return chosen


def _homes(folder: Path) -> tuple[Path | None, Path]:
    """The folders of annotations (None = none here) and of images."""
    below = {path.name.lower(): path for path in folders_in(folder)}
    if "annotations" in below:
        return below["annotations"], below.get("jpegimages", below.get("images", folder))
    return (folder if any(folder.glob("*.xml")) else None), folder


def _images_by_stem(folder: Path) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if is_hidden(path.name) or not is_image(path.name):
            continue
        if path.stem in images:
            raise UserError(
                f"{images[path.stem]} and {path.name} have the same name but for the suffix, so it is not clear which "
                "the annotation means; remove or rename one"
            )
        images[path.stem] = path
    return images


def _stems(file: Path, there: Mapping[str, Path]) -> list[str]:
    """The image names of a list file, each once."""
    stems: dict[str, None] = {}
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        if name not in there:
            name = name.split()[0]  # lists of a class have a second column
        if name not in there:
            raise UserError(f"{file}, line {number}: no annotation {name}.xml; add it or remove the line")
        stems[name] = None
    return list(stems)


def _scene(annotation: Path, image: Path, root: Path) -> Scene:
    content, tree = _parse_xml(annotation)
    if tree.tag != "annotation":
        raise UserError(f"{annotation}, line {tree.get(LINE)}: expected <annotation>, got <{tree.tag}>")
    said = tuple(whole_number(tree.findtext(f"size/{side}", "0")) for side in ("width", "height"))
    truths = tuple(_truth(annotation, node) for node in tree.findall("object"))
    digest = hashlib.sha256(content).hexdigest()[:16]
    return Scene(annotation.relative_to(root).as_posix(), image, truths, digest, (said[0], said[1]))


def _truth(annotation: Path, node: ElementTree.Element) -> Truth:
    where = f"{annotation}, line {node.get(LINE)}"
    name = node.findtext("name", "").strip()
    if not name:
        raise UserError(f"{where}: an <object> without a <name>; add its class")
    place, corners = node.find("bndbox"), []
    for side in ("xmin", "ymin", "xmax", "ymax"):
        text = "" if place is None else place.findtext(side, "").strip()
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{where}: expected a number in <bndbox><{side}> of {name!r}, got {text!r}")
        corners.append(value)
    flag = node.findtext("difficult", "0").strip()
    return Truth(name, cast(Corners, tuple(corners)), flag not in ("", "0", "false", "False"), where)


def _parse_xml(path: Path) -> tuple[bytes, ElementTree.Element]:
    """Content and tree of an XML file. Declarations of a DTD are refused, so nothing can be expanded or fetched."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read annotation {path}: {error}") from error
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        builder.start(tag, {**attributes, LINE: str(parser.CurrentLineNumber)})

    def refuse(*_: object) -> NoReturn:
        raise UserError(
            f"{path}, line {parser.CurrentLineNumber}: a DTD or entity is declared (<!DOCTYPE or <!ENTITY), which is "
            "refused because it can read other files or fill the memory; remove the declaration"
        )

    parser.StartElementHandler, parser.EndElementHandler = start, builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}, line {parser.CurrentLineNumber}: not valid XML: {error}; correct the file") from error
    return content, builder.close()
