from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.export.sensitivity import layer_of, sensitivity
from tests.export import nets
from tests.export.test_quantised import Images, images, templates


def rounded(numbers: Images, low: Images, high: Images, most: int) -> Images:
    """To whole steps of the range, counted from zero."""
    step = (high - low) / most
    zero = np.rint(-low / step)
    return (np.clip(np.rint(numbers / step) + zero, 0, most) - zero) * step


def test_a_layers_error_is_that_of_its_input_and_weight_in_8_bits():
    model, _, _, quantised = templates(nets.Mobile())
    layer = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    seen: list[Tensor] = []
    model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        expected = model(torch.from_numpy(images())[:4]).numpy()
        model(torch.from_numpy(images()))
    few, inputs = (tensor.numpy() for tensor in seen)
    weight = model.get_submodule(layer).weight.detach().numpy()  # type: ignore[union-attr, operator]
    largest = np.abs(weight).max(1, keepdims=True)
    in_8_bits = rounded(few, np.minimum(inputs.min(), 0), np.maximum(inputs.max(), 0), 255)
    difference = in_8_bits @ rounded(weight, -largest, largest, 254).T - few @ weight.T
    found = sensitivity(quantised, images()[:4])
    assert found[layer] == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(expected), rel=1e-3)


@pytest.mark.parametrize("name", ["Mobile", "Shuffle", "Attention"])
def test_every_layer_is_told_in_the_order_of_the_network(name: str):
    _, _, _, quantised = templates(getattr(nets, name)())
    found = sensitivity(quantised, images(2))
    assert list(found) == [layer_of(weight) for weight in quantised.layers]
    assert all(0 < error < 0.2 for error in found.values())
