from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from twofold.errors import TwofoldError
from twofold.lab.config import ModelConfig
from twofold.lab.models import ACTIVATIONS, MODELS, build


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (ModelConfig("mlp", width=8, depth=2), (40,)),
        (ModelConfig("mlp", width=8, depth=2), (1, 7, 7)),
        (ModelConfig("conv", width=4, depth=4), (40,)),
        (ModelConfig("conv", width=4, depth=3), (2, 40)),
        (ModelConfig("conv", width=4, depth=5), (1, 14, 14)),
        (ModelConfig("wideresnet", width=1, depth=10), (3, 14, 14)),
        (ModelConfig("resnet", width=2, depth=50), (3, 32, 32)),
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(config, shape, norm):
    model = build(replace(config, norm=norm), shape, 7, seed=0)
    outputs = model(torch.randn(5, *shape))
    assert outputs.shape == (5, 7)
    outputs.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    kinds = {"none": (), "batch": (nn.BatchNorm1d, nn.BatchNorm2d), "layer": (nn.GroupNorm,)}
    found = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm)]
    assert bool(found) == (norm != "none")
    assert all(isinstance(module, kinds[norm]) for module in found)


@pytest.mark.parametrize(
    ("config", "shape", "expected"),
    [
        (ModelConfig("mlp", width=64, depth=4), (40,), 41 * 64 + 3 * 65 * 64 + 65 * 10),
        (ModelConfig("mlp", width=100, depth=3), (1, 14, 14), 197 * 100 + 2 * 101 * 100 + 101 * 10),
        (ModelConfig("mlp", width=8, depth=1, norm="layer"), (4,), 5 * 8 + 16 + 9 * 10),
        (ModelConfig("conv", width=4, depth=2), (1, 14, 14), 10 * 4 + 37 * 4 + 5 * 10),
        (ModelConfig("wideresnet", width=10, depth=28, norm="batch"), (3, 32, 32), 36_479_194),
    ],
    ids=str,
)
def test_parameter_counts(config, shape, expected):
    assert size(build(config, shape, 10, seed=0)) == expected


@pytest.mark.parametrize(("depth", "parameters", "macs"), [(50, 25_557_032, 4.089e9), (101, 44_549_160, 7.801e9)])
def test_resnets_have_their_known_sizes_and_costs(depth, parameters, macs):
    config = ModelConfig("resnet", width=64, depth=depth, activation="relu", norm="batch")
    with torch.device("meta"):
        model = MODELS["resnet"](config, (3, 224, 224), 1000).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert size(model) == parameters
    assert counter.get_total_flops() == pytest.approx(2 * macs, rel=1e-3)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_blocks_of_a_resnet_start_as_the_identity(norm):
    model = build(ModelConfig("resnet", width=2, depth=50, activation="relu", norm=norm), (3, 32, 32), 7, seed=0)
    x = torch.randn(2, 8, 6, 6).relu()
    torch.testing.assert_close(model.get_submodule("blocks.1")(x), x)


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("shape", [(40,), (2, 12), (1, 14, 14)], ids=str)
def test_the_transformer_trains_every_parameter(shape, norm):
    model = build(ModelConfig("transformer", width=32, depth=2, norm=norm), shape, 7, seed=0)
    outputs = model(torch.randn(5, *shape))
    assert outputs.shape == (5, 7)
    outputs.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert any(isinstance(module, nn.LayerNorm) for module in model.modules()) == (norm == "layer")


def test_patches_of_an_image_hold_neighbouring_pixels_of_all_channels():
    patches = build(ModelConfig("transformer", width=16, depth=1), (2, 4, 6), 3, seed=0).get_submodule("patches")
    x = torch.randn(3, 2, 4, 6)
    found = patches(x)
    assert found.shape == (3, 6, 8)
    torch.testing.assert_close(found[:, 4], x[:, :, 2:4, 2:4].flatten(1))


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (ModelConfig("transformer", width=32, depth=1, norm="batch"), (40,), "norm"),
        (ModelConfig("transformer", width=20, depth=1), (40,), "multiple of 16"),
        (ModelConfig("transformer", width=16, depth=1), (42,), "multiple of 4"),
        (ModelConfig("transformer", width=16, depth=1), (1, 7, 7), "even height"),
    ],
    ids=str,
)
def test_what_the_transformer_cannot_take(config, shape, message):
    with pytest.raises(TwofoldError, match=message):
        build(config, shape, 3, seed=0)


def test_layer_norm_of_the_mlp_is_layer_norm():
    model = build(ModelConfig("mlp", width=8, depth=1, norm="layer"), (4,), 3, seed=0)
    x = torch.randn(5, 4)
    hidden = model.get_submodule("linear0")(x)
    torch.testing.assert_close(model.get_submodule("norm0")(hidden), nn.functional.layer_norm(hidden, (8,)))


def test_a_wideresnet_without_norms_starts_with_blocks_that_pass_their_input_on():
    model = build(ModelConfig("wideresnet", width=1, depth=28), (1, 8, 8), 10, seed=0)
    assert model(torch.randn(4, 1, 8, 8)).abs().max() < 100


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_name(name):
    model = build(ModelConfig("mlp", width=4, depth=1, activation=name, beta=3.0), (4,), 2, seed=0)
    x = torch.linspace(-2, 2, 9)
    y = model.get_submodule("activation0")(x)
    expected = {
        "relu": x.relu(),
        "leaky_relu": torch.where(x > 0, x, 0.2 * x),
        "gelu": x * torch.special.ndtr(x),
        "gelu_tanh": nn.functional.gelu(x, approximate="tanh"),
        "silu": x * x.sigmoid(),
        "mish": x * (1 + x.exp()).log().tanh(),
        "elu": torch.where(x > 0, x, x.expm1()),
        "softplus": (1 + x.exp()).log(),
        "tanh": x.tanh(),
        "sigmoid": x.sigmoid(),
        "beta_gelu": x * torch.special.ndtr(3 * x),
    }[name]
    torch.testing.assert_close(y, expected)


def test_initialisation_comes_from_the_seed_alone():
    config = ModelConfig("conv", width=4, depth=2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(config, (1, 8, 8), 10, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float64)
    try:
        second, other = build(config, (1, 8, 8), 10, seed=5), build(config, (1, 8, 8), 10, seed=6)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)
    assert not torch.equal(first.get_submodule("conv0").weight, other.get_submodule("conv0").weight)


@pytest.mark.parametrize(
    ("name", "depth", "shape"), [("wideresnet", 10, (40,)), ("resnet", 50, (40,)), ("conv", 2, (1, 2, 3, 4))]
)
def test_inputs_that_do_not_fit_are_refused(name, depth, shape):
    with pytest.raises(TwofoldError, match="height, width"):
        build(ModelConfig(name, width=1, depth=depth), shape, 10, seed=0)
