"""Linear layers laid out for the CPU give what plain ones give; int8 ones nearly, row by row."""

import pytest
import torch
from torch import nn

from generator_service.model.linears import Int8Linear, PackedLinear, PlainProduct, projection, with_linears
from generator_service.model.loader import as_backbone
from generator_service.types import Quantization
from tests.parity.tiny_models import tiny_generator


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 20, 333])
def test_packed_layer_is_the_plain_one(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(48, 113, bias=bias)
    x = torch.randn(2, rows, 48)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_int8_layer_is_within_its_rounding(bias: bool) -> None:
    """Each factor is off by half a step at most: a 254th of its row's largest magnitude."""
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 64, bias=bias), torch.randn(9, 256)
    with torch.inference_mode():
        steps = x.abs().amax(1, keepdim=True) / 254, linear.weight.abs().amax(1, keepdim=True) / 254
        bound = (
            steps[0] * linear.weight.abs().sum(1)
            + (x.abs().sum(1, keepdim=True) + 256 * steps[0]) * steps[1].T
        )
        assert ((Int8Linear(linear)(x) - linear(x)).abs() <= bound + 1e-5).all()


def test_int8_row_does_not_depend_on_its_neighbours() -> None:
    """A scale for the whole batch would let a loud neighbour wipe out a quiet row."""
    torch.manual_seed(0)
    layer, quiet = Int8Linear(nn.Linear(32, 16)), torch.randn(1, 32)
    with torch.inference_mode():
        together = layer(torch.cat([quiet, 1000 * torch.randn(3, 32)]))
    assert torch.equal(together[:1], layer(quiet))


@pytest.mark.parametrize("rows", [1, 5, 160, 333])
def test_int8_products_are_one_on_every_processor(rows: int) -> None:
    """Bytes as they are and bytes moved by 128 give the same exact sums, to the largest that there are."""
    torch.manual_seed(rows)
    linear, x = nn.Linear(768, 50), torch.randint(-127, 128, (rows, 768)).to(torch.int8)
    x[0] = 127
    with torch.no_grad():
        linear.weight[0] = linear.weight.abs().max()
    with torch.inference_mode():
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        quantized = (linear.weight / scale).round().to(torch.int8)
        torch.testing.assert_close(
            Int8Linear(linear).product(x.clone()), PlainProduct(quantized, scale)(x), atol=0, rtol=1e-6
        )


def test_int8_row_of_zeros_is_the_bias() -> None:
    linear = nn.Linear(8, 4)
    with torch.inference_mode():
        torch.testing.assert_close(Int8Linear(linear)(torch.zeros(2, 8)), linear.bias.expand(2, 4))


def test_module_is_changed_in_a_copy() -> None:
    """Hugging Face's own forward runs on the modules that were given."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    outer = nn.Sequential(inner, nn.LayerNorm(4))
    changed = with_linears(outer, Quantization.NONE)
    assert type(inner[0]) is nn.Linear
    assert outer[0] is inner
    assert [type(m) for m in changed.modules()].count(PackedLinear) == 1


def test_other_dtypes_stay_as_they_are() -> None:
    half = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    assert with_linears(half, Quantization.NONE) is half


def test_projection_shares_its_weight() -> None:
    weight = nn.Parameter(torch.randn(5, 3))
    assert projection(weight, None).weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("family", ["bart", "t5", "t5-gated"])
def test_every_linear_layer_of_a_backbone_is_laid_out(family: str) -> None:
    for quantization, kind in ((Quantization.NONE, PackedLinear), (Quantization.INT8, Int8Linear)):
        backbone = as_backbone(tiny_generator(family, 0), quantization=quantization)
        assert isinstance(backbone, nn.Module)
        kinds = [type(m) for m in backbone.modules()]
        assert nn.Linear not in kinds
        assert kinds.count(kind) > 10


def test_int8_is_refused_where_it_cannot_be_had() -> None:
    with pytest.raises(ValueError, match="int8"):
        as_backbone(tiny_generator("bart", 0), "general", Quantization.INT8)
    with pytest.raises(ValueError, match="int8"):
        as_backbone(tiny_generator("bart", 0).double(), quantization=Quantization.INT8)
