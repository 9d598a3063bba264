"""Networks of other packages for the coverage benchmark, small and with random weights; none of them is a dependency.

Install what you ask for beside the project, for example into a folder on PYTHONPATH:

    pip install --no-deps --target zoo segmentation-models-pytorch transformers monai pytorchcv vit-pytorch einops
    PYTHONPATH=zoo python benchmarks/coverage.py --zoo segmentation-models --zoo pytorchcv

`ultralytics` wants `opencv-python-headless` and `polars`, and is told to install nothing; `effdet` wants `pycocotools`
and `omegaconf`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

os.environ |= {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false"}

Built = tuple[nn.Module, tuple[Any, ...]]


def images(size: int, channels: int = 3) -> tuple[Any, ...]:
    return (torch.randn(1, channels, size, size),)


SEGMENTATION = tuple(
    f"{decoder}:{encoder}"
    for encoder in ("resnet18", "mobilenet_v2", "timm-efficientnet-b0")
    for decoder in "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer".split()
)


def segmentation_models(name: str) -> Built:
    smp = importlib.import_module("segmentation_models_pytorch")
    decoder, encoder = name.split(":")
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=3), images(96)


ULTRALYTICS = tuple(
    "yolov3-tiny yolov5n yolov6n yolov8n yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls yolov8n-ghost yolov8n-p2 "
    "yolov9t yolov10n yolo11n yolo11n-seg yolo11n-cls yolo12n".split()
)


def ultralytics(name: str) -> Built:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    kinds = {"seg": "SegmentationModel", "pose": "PoseModel", "obb": "OBBModel", "cls": "ClassificationModel"}
    kind = kinds.get(name.rpartition("-")[2], "DetectionModel")
    return getattr(tasks, kind)(f"{name}.yaml", verbose=False), images(96)


TRANSFORMERS: dict[str, dict[str, Any]] = {
    name: {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    for name in "ViT DeiT Beit Dinov2 ViTMSN ViTMAE IJepa SiglipVision CLIPVision".split()
} | {
    "Swin": {"embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4], "image_size": 64},
    "Swinv2": {"embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4], "image_size": 64},
    "Segformer": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "Pvt": {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "image_size": 64},
    "PvtV2": {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "image_size": 64},
    "ResNet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]},
    "RegNet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "groups_width": 16},
    "ConvNext": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
    "ConvNextV2": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
    "MobileNetV1": {"depth_multiplier": 0.5},
    "MobileNetV2": {"depth_multiplier": 0.5},
    "MobileViT": {"hidden_sizes": [48, 64, 80], "image_size": 64},
    "MobileViTV2": {"base_attn_unit_dims": [32, 48, 64], "image_size": 64},
    "PoolFormer": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "Levit": {"hidden_sizes": [32, 64, 96], "depths": [1, 1, 1], "key_dim": [8, 8, 8], "image_size": 64},
    "Cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 1, 2], "drop_path_rate": [0.0, 0.0, 0.0]},
    "Yolos": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": [64, 64]},
    "FocalNet": {"embed_dim": 16, "depths": [1, 1, 2, 1], "image_size": 64},
    "EfficientNet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "Bit": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "num_groups": 4},
    "Hiera": {"embed_dim": 24, "image_size": [64, 64], "depths": [1, 1, 2, 1]},
    "SwiftFormer": {"embed_dims": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "Dinat": {"embed_dim": 16},
    "VitDet": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64},
    "GLPN": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
}


def transformers(name: str) -> Built:
    package = importlib.import_module("transformers")
    config = getattr(package, f"{name}Config")(**{"image_size": 64, **TRANSFORMERS[name]})
    return getattr(package, f"{name}Model")(config), images(64)


MONAI: dict[str, dict[str, Any]] = {
    "UNet": {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2},
    "BasicUNet": {"features": (8, 8, 16, 32, 64, 8)},
    "BasicUNetPlusPlus": {"features": (8, 8, 16, 32, 64, 8)},
    "AttentionUnet": {"channels": (8, 16, 32), "strides": (2, 2)},
    "DynUNet": {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]},
    "SegResNet": {"init_filters": 8},
    "VNet": {},
    "UNETR": {"img_size": 64, "feature_size": 8, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4},
    "SwinUNETR": {"feature_size": 12},
    "HighResNet": {},
    "AHNet": {"upsample_mode": "bilinear"},
    "FlexibleUNet": {"backbone": "efficientnet-b0"},
    "DenseNet121": {},
    "SEResNet50": {},
    "EfficientNetBN": {"model_name": "efficientnet-b0"},
    "ResNet": {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [8, 16, 32, 64]},
    "AutoEncoder": {"channels": (8, 16), "strides": (2, 2)},
}


def monai(name: str) -> Built:
    nets = importlib.import_module("monai.networks.nets")
    ends = {"out_channels": 2}
    if name == "ResNet":
        ends = {"n_input_channels": 3}
    elif name in ("SEResNet50", "FlexibleUNet", "EfficientNetBN"):
        ends = {"out_channels": 2} if name == "FlexibleUNet" else {"num_classes": 2}
    inputs = {} if name == "ResNet" else {"in_channels": 3}
    return getattr(nets, name)(spatial_dims=2, **inputs, **ends, **MONAI[name]), images(64)


PYTORCHCV = tuple(
    "resnet10 preresnet10 resnext14_16x4d seresnet10 sepreresnet10 seresnext26_32x4d senet16 ibn_resnet50 "
    "airnet50_1x64d_r2 bam_resnet18 cbam_resnet18 resattnet56 sknet18 scnet50 regnetx002 regnety002 diracnet18v2 "
    "densenet121 condensenet74_c4_g4 peleenet wrn16_10_cifar10 darknet_tiny vovnet27s hrnet_w18_small_v1 "
    "selecsls42b hardnet39ds squeezenet_v1_1 squeezeresnet_v1_1 sqnxt23_w1 shufflenet_g3_wd4 shufflenetv2_wd2 "
    "shufflenetv2b_wd2 menet108_8x1_g3 mobilenet_wd4 fdmobilenet_wd4 mobilenetv2_wd4 igcv3_wd4 "
    "mobilenetv3_small_w7d20 mnasnet_small proxylessnas_mobile fbnet_cb xception efficientnet_b0 mixnet_s resneta10 "
    "resnetd50b fishnet99 espnetv2_wd2 dla34 ghostnet spnasnet dicenet_wd5 inceptionv3 resnest14 "
    "lwopenpose2d_mobilenet_cmupan_coco icnet_resnetd50b_cityscapes fastscnn_cityscapes cgnet_cityscapes "
    "dabnet_cityscapes sinet_cityscapes bisenet_resnet18_celebamaskhq".split()
)


def pytorchcv(name: str) -> Built:
    get_model = importlib.import_module("pytorchcv.model_provider").get_model
    options = {"in_size": (128, 128)} if "cityscapes" in name else {}
    model = get_model(name, pretrained=False, **options)
    size = getattr(model, "in_size", (224, 224))[0]
    return model, images(32 if "cifar" in name else min(size, 299) if size > 224 else size)


VIT_PYTORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit", {}),
    "SimpleViT": ("simple_vit", {}),
    "DeepViT": ("deepvit", {}),
    "CaiT": ("cait", {"cls_depth": 1}),
    "ParallelViT": ("parallel_vit", {}),
    "LocalViT": ("local_vit", {}),
}


def vit_pytorch(name: str) -> Built:
    module, more = VIT_PYTORCH[name]
    model = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)
    shape = {"image_size": 64, "patch_size": 16, "num_classes": 5, "dim": 48, "depth": 2, "heads": 4, "mlp_dim": 96}
    return model(**shape, **more), images(64)


def effdet(name: str) -> Built:
    return importlib.import_module("effdet").create_model(name, pretrained=False, pretrained_backbone=False), images(
        128
    )


def facenet(name: str) -> Built:
    return getattr(importlib.import_module("facenet_pytorch"), name)(pretrained=None, classify=True, num_classes=9), (
        torch.randn(1, 3, 160, 160),
    )


ZOOS: dict[str, tuple[str, tuple[str, ...], Callable[[str], Built]]] = {
    "segmentation-models": ("segmentation_models_pytorch", SEGMENTATION, segmentation_models),
    "ultralytics": ("ultralytics.nn.tasks", ULTRALYTICS, ultralytics),
    "transformers": ("transformers.modeling_utils", tuple(TRANSFORMERS), transformers),
    "monai": ("monai.networks.nets", tuple(MONAI), monai),
    "pytorchcv": ("pytorchcv.model_provider", PYTORCHCV, pytorchcv),
    "vit-pytorch": ("vit_pytorch", tuple(VIT_PYTORCH), vit_pytorch),
    "effdet": ("effdet", ("tf_efficientdet_lite0", "efficientdet_d0"), effdet),
    "facenet": ("facenet_pytorch", ("InceptionResnetV1",), facenet),
}
"""Zoo -> what to import before the forks, names of its networks, and what builds one."""
