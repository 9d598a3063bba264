"""The networks of the coverage benchmark: every float builder of torchvision, one small network of each timm family."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._other_zoos import ZOOS

TIMM = """
    beit_base_patch16_224 botnet26t_256 halonet26t lambda_resnet26t bat_resnext26ts gcresnet33ts repvgg_a0
    cait_xxs24_224 coat_lite_tiny convit_tiny convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240
    cspdarknet53 cspresnet50 cs3darknet_s davit_tiny deit_tiny_patch16_224 densenet121 dla34 dpn48b
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_lite0 mixnet_s
    mnasnet_100 mobilenetv2_100 tinynet_e efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0
    fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 ghostnetv2_100 hardcorenas_a hgnetv2_b0 hiera_tiny_224
    hrnet_w18_small iformer_t inception_next_atto inception_v4 lcnet_050 levit_128s lowformer_b0 mambaout_femto
    coatnet_nano_rw_224 maxvit_pico_rw_256 poolformer_s12 caformer_s18 mixer_s32_224 gmlp_ti16_224 resmlp_12_224
    mobilenetv3_small_050 fbnetv3_b mobilenetv4_conv_small mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny
    nextvit_small nf_regnet_b0 nfnet_l0 pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_b16
    repghostnet_050 repvit_m0_9 res2net50_26w_4s resnest14d resnet10t ecaresnet26t seresnet18 resnetv2_50 rexnet_100
    selecsls42b legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224
    tresnet_m twins_pcpvt_small vgg11_bn visformer_tiny vit_tiny_patch16_224 vit_relpos_small_patch16_224
    vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_dw legacy_xception xception41
    xcit_nano_12_p16_224
""".split()
"""One small network of each family of timm 1.0 that is built for images and stays below 60 M parameters."""


def torchvision_names() -> list[str]:
    """Every builder that is not quantized."""
    from torchvision.models import list_models

    return [name for name in list_models() if not name.startswith("quantized_")]


def build(source: str, name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A network in eval mode with random weights, and an example input (a tuple of arguments).

    Args:
        source: ``torchvision``, ``timm`` or one of ``ZOOS``.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if source in ZOOS:
            model, example = ZOOS[source][2](name)
        else:
            model, example = (_timm if source == "timm" else _torchvision)(name)
    calibrate(randomise(model.eval()), example)
    return model, example


def _timm(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, (torch.randn(1, *model.pretrained_cfg["input_size"]),)


def _torchvision(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    import torchvision.models as tv

    builder = tv.get_model_builder(name)
    family = builder.__module__.split(".")[2]
    if family == "detection":
        model = builder(weights=None, weights_backbone=None)
        size = 320 if "320" in name else 300 if "300" in name else 256
        if hasattr(model.transform, "min_size") and size == 256:
            model.transform.min_size, model.transform.max_size = (256,), 256
        _spread_scores(model)
        return model, ([torch.rand(3, size, size)],)
    if family == "segmentation":
        return builder(weights=None, weights_backbone=None), (torch.randn(1, 3, 224, 224),)
    if family == "optical_flow":
        return builder(weights=None), (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
    if family == "video":
        frames = 16 if "mvit" in name or name == "s3d" else 8
        size = 224 if "mvit" in name or name == "s3d" else 112
        return builder(weights=None), (torch.randn(1, 3, frames, size, size),)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    size = 299 if name == "inception_v3" else 224
    return builder(weights=None, **options), (torch.randn(1, 3, size, size),)


def _spread_scores(model: nn.Module) -> None:
    """Fresh detection heads give all boxes one score; draw them so that scores differ and boxes are found."""
    for name, module in model.named_modules():
        is_score = any(word in name for word in ("cls", "class", "mask", "keypoint"))
        if is_score and isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    if hasattr(model, "roi_heads"):
        model.roi_heads.score_thresh = -1.0
        model.roi_heads.detections_per_img = 20
        model.rpn._post_nms_top_n = {"training": 100, "testing": 100}


def calibrate(model: nn.Module, example: tuple[Any, ...]) -> None:
    """Batch norm statistics of the example and a second one, so that a deep random network still tells inputs apart."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    twice = tuple(
        [*x, torch.rand_like(x[0])] if isinstance(x, list) else torch.cat([x, torch.randn_like(x)]) for x in example
    )
    moments = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum, norm.training = 1.0, True
    with torch.no_grad():
        model(*twice)
    for norm, momentum in zip(norms, moments, strict=True):
        norm.momentum, norm.training = momentum, False


def randomise(model: nn.Module) -> nn.Module:
    """Replace constant values (fresh norms, biases, layer scales) by random ones, so that a wrong cut is visible."""
    g = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            _shake(name, tensor, g)
        for name, tensor in module.named_buffers(recurse=False):
            if name in ("running_mean", "running_var") or (name in ("weight", "bias") and tensor.ndim == 1):
                _shake(name, tensor, g)
    return model


def _shake(name: str, tensor: Tensor, g: torch.Generator) -> None:
    if tensor.numel() < 2 or not tensor.is_floating_point() or tensor.detach().std() > 0:
        return
    with torch.no_grad():
        if float(tensor.detach().flatten()[0]) == 0 or name.endswith("bias"):
            tensor.normal_(0, 0.2, generator=g)
        else:
            tensor.uniform_(0.5, 1.5, generator=g)
