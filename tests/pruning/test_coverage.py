"""The coverage benchmark in a reduced form: small networks of every task, and of families whose code states sizes."""

from __future__ import annotations

import pytest
import torch

from benchmarks._zoo import TIMM, build, torchvision_names
from benchmarks.coverage import figures_of, peers, proven, write
from secateur.pruning.trace import trace

NETWORKS = {
    "torchvision": (
        "squeezenet1_1 googlenet shufflenet_v2_x0_5 mnasnet0_5 regnet_x_400mf lraspp_mobilenet_v3_large "
        "ssdlite320_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn r3d_18 raft_small"
    ).split(),
    "timm": (
        "edgenext_xx_small efficientvit_m0 ghostnet_050 levit_128s mobilevit_xxs nf_regnet_b0 skresnet18 "
        "starnet_s050 tiny_vit_5m_224 vit_tiny_patch16_224"
    ).split(),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("source", "name"), [(source, name) for source, names in NETWORKS.items() for name in names])
def test_half_of_every_group_can_go(source: str, name: str) -> None:
    model, example = build(source, name)
    graph = trace(model, *example)
    row = proven(model, example, graph)
    assert row["status"] == "ok", row
    assert row["macs_left"] < 0.75


def test_every_float_builder_of_torchvision_is_listed() -> None:
    names = torchvision_names()
    assert {"maskrcnn_resnet50_fpn", "swin_v2_t", "raft_large", "mvit_v2_s", "ssd300_vgg16"} <= set(names)
    assert not any("quantized" in name for name in names) and len(names) > 100
    assert len(set(TIMM)) == len(TIMM) > 50


@pytest.mark.filterwarnings("ignore")
def test_the_peer_gets_the_same_network() -> None:
    model, example = build("torchvision", "squeezenet1_1")
    row = peers(model, example)
    assert row["peer"] == "ok" and row["peer_macs_left"] < 0.5 and row["peer_s"] > 0


def test_the_page_and_the_figures(tmp_path) -> None:  # type: ignore[no-untyped-def]
    good = {"status": "ok", "groups": 3, "error": 1e-7, "macs_left": 0.25, "forward_s": 0.1, "trace_s": 0.1}
    good |= {"prune_s": 0.1, "peer": "ok", "peer_s": 1.0, "peer_macs_left": 0.3}
    bad = {"status": "wrong", "why": "cost | differs", "forward_s": 0.1, "trace_s": 2.0, "peer": "refused"}
    rows = [
        {"source": "torchvision", "name": "fcn_resnet50", **good},
        {"source": "torchvision", "name": "vgg11", **bad},
    ]
    figures = {f.name: f for f in figures_of(rows)}
    assert figures["torchvision_ok_share"].value == 0.5 and not figures["torchvision_ok_share"].ok
    assert figures["torchvision_wrong"].value == 1 and not figures["torchvision_wrong"].ok
    assert figures["detection_and_segmentation_ok_share"].ok
    assert figures["traces_above_5_forwards_and_1_s"].value == 1
    assert figures["speedup_vs_torch_pruning"].value == pytest.approx(5)
    write(tmp_path / "coverage.md", rows, list(figures.values()), "python benchmarks/coverage.py")
    page = (tmp_path / "coverage.md").read_text()
    assert "| fcn_resnet50 | ok | 3 | 1.0e-07 | 25% | 0.100 | 1.0x | 0.10 | ok | 30% | 5.0x |  |" in page
    assert "| vgg11 | wrong |" in page and "cost / differs" in page and "**missed**" in page


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu_and_in_half_precision(dtype: torch.dtype) -> None:
    model, (images,) = build("torchvision", "mobilenet_v3_small")
    model, example = model.to("cuda", dtype), (images.to("cuda", dtype),)
    row = proven(model, example, trace(model, *example))
    assert row["status"] == "ok", row
