"""The norm that stands in for Transformer Engine's."""

from types import SimpleNamespace

import pytest
import torch


def build(normalization, zero_centered=False, sequence_parallel=False):
    from nemo_warp.aligner.compat.norm import LayerNorm

    config = SimpleNamespace(
        normalization=normalization,
        layernorm_zero_centered_gamma=zero_centered,
        sequence_parallel=sequence_parallel,
        persist_layer_norm=True,
    )
    return LayerNorm(config, 8, eps=1e-6)


def test_equals_torch_bit_for_bit_in_fp32():
    x = torch.randn(3, 8)
    assert torch.equal(build("RMSNorm")(x), torch.nn.RMSNorm(8, eps=1e-6)(x))
    assert torch.equal(build("LayerNorm")(x), torch.nn.LayerNorm(8, eps=1e-6)(x))


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_zero_centred_weights_are_added_to_one_in_fp32(normalization):
    """2^-10 added to 1 in bf16 is 1: it would be as if the weight were not there."""
    norm = build(normalization, zero_centered=True).bfloat16()
    assert not norm.weight.any()
    with torch.no_grad():
        norm.weight.fill_(2.0**-10)
    x = torch.randn(3, 8).bfloat16()
    y = x.double()
    if normalization == "LayerNorm":
        y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), (y.float() * (1 + 2.0**-10)).bfloat16())


def test_sequence_parallel_parameters_are_marked():
    norm = build("LayerNorm", sequence_parallel=True)
    assert [parameter.sequence_parallel for parameter in norm.parameters()] == [True, True]
    assert not build("RMSNorm").weight.sequence_parallel


def test_other_normalizations_are_refused():
    with pytest.raises(ValueError, match="expected LayerNorm or RMSNorm"):
        build("ScaleNorm")
