"""Tile-packed int4 is read by the layout's definition: packed here lane by lane, as torch's CUDA code does."""

import types

import pytest
import torch

from quantlab.backends.torchao.readback import _dense, _from_tiles


def packed(codes, inner):
    """(out, in) codes 0..15 to (out / 8, in / (16 inner), 32, inner / 2) words."""
    rows, columns = codes.shape
    words = torch.zeros(rows // 8, columns // (16 * inner), 32, inner // 2, dtype=torch.int64)
    for tile in range(words.shape[0]):
        for outer in range(words.shape[1]):
            for lane in range(32):
                for pair in range(words.shape[3]):
                    first = (outer * inner + 2 * pair) * 16 + (lane % 4) * 2
                    columns_of = [first + c for c in (0, 1, 8, 9, 16, 17, 24, 25)]
                    v = [int(codes[tile * 8 + lane // 4, c]) for c in columns_of]
                    word = 0
                    for place, which in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                        word |= v[which] << (4 * place)
                    words[tile, outer, lane, pair] = word
    return words.to(torch.int32)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(8, 128), (24, 256), (19, 200)])
def test_codes_and_scales(shape, group):
    draw = torch.Generator().manual_seed(group)
    rows, columns = -(-shape[0] // 8) * 8, -(-shape[1] // 128) * 128
    codes = torch.randint(0, 16, (rows, columns), generator=draw)
    scales = torch.rand(columns // group, rows, 2, generator=draw).to(torch.bfloat16)
    weight = types.SimpleNamespace(qdata=packed(codes, 8), scale_and_zero=scales, shape=torch.Size(shape))
    wide = scales.float().repeat_interleave(group, dim=0)
    wanted = ((codes - 8) * wide[..., 0].t() + wide[..., 1].t()).to(torch.bfloat16).float()
    assert torch.equal(_from_tiles(weight), wanted[: shape[0], : shape[1]])


def test_a_scale_of_the_inputs_counts_once():
    codes, scales = torch.randint(0, 16, (8, 128)), torch.ones(4, 8, 2, dtype=torch.bfloat16)
    pre_scale = torch.linspace(0.5, 2, 128, dtype=torch.bfloat16)
    weight = types.SimpleNamespace(
        qdata=packed(codes, 8), scale_and_zero=scales, shape=torch.Size((8, 128)), act_pre_scale=pre_scale
    )
    assert torch.equal(_dense(weight, "Int4TilePackedTo4dTensor"), (codes - 7).float() * pre_scale.float())
