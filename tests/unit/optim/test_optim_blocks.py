import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockllm_cli.optim.blocks import Block, Piece, cut_blocks

SHAPES = {
    "embed": (40, 8),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in (("q", (8, 8)), ("up", (12, 8)), ("norm", (8,)))
    },
    "head": (40, 8),
}


def layer_of(name):
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def cut(budget, **keywords):
    return cut_blocks(SHAPES, budget=budget, layer_of=layer_of, **keywords)


def test_tensors_in_the_models_order():
    assert [block.name for block in cut(1000)] == list(SHAPES)
    assert all(block.pieces == (Piece(block.name, SHAPES[block.name]),) for block in cut(1000))


def test_layers():
    blocks = cut(1000, granularity="layer")
    assert [block.name for block in blocks] == ["embed", "model.layers.0", "model.layers.1", "head"]
    assert [piece.parameter for piece in blocks[1].pieces] == [name for name in SHAPES if "layers.0" in name]
    assert blocks[1].size == 64 + 96 + 8


def test_groups_and_the_rest_by_itself():
    blocks = cut(1000, groups=[r"\.q$", "up|norm"])
    assert [block.name for block in blocks] == ["embed", r"\.q$", "up|norm", "head"]
    assert [piece.parameter for piece in blocks[1].pieces] == ["model.layers.0.q", "model.layers.1.q"]
    with pytest.raises(ValueError, match="'nothing'"):
        cut(1000, groups=["nothing"])
    with pytest.raises(ValueError, match="before it does not"):
        cut(1000, groups=["q", r"layers.0.q"])


def test_the_tensors_of_a_cut_group_stand_where_the_model_has_them():
    blocks = cut(100, groups=["q|up"])
    parameters = [block.pieces[0].parameter for block in blocks]
    assert parameters == sorted(parameters, key=list(SHAPES).index)
    assert "q|up" not in [block.name for block in blocks]


def test_a_layer_that_does_not_fit_is_cut_into_tensors_and_these_into_rows():
    names = [block.name for block in cut(80, granularity="layer")]
    assert names[:4] == ["embed@0:10", "embed@10:20", "embed@20:30", "embed@30:40"]
    assert names[4:8] == [
        "model.layers.0.q",
        "model.layers.0.up@0:6",
        "model.layers.0.up@6:12",
        "model.layers.0.norm",
    ]


@given(rows=st.integers(1, 60), width=st.integers(1, 12), budget=st.integers(0, 400))
def test_slices_are_few_equal_and_cover_the_tensor(rows, width, budget):
    blocks = cut_blocks({"w": (rows, width)}, budget=budget, layer_of=layer_of)
    sizes = [block.size // width for block in blocks]
    assert sum(sizes) == rows
    assert max(sizes) - min(sizes) <= 1
    if width <= budget:
        assert all(block.size <= budget for block in blocks)
        fewer = len(blocks) - 1
        assert fewer == 0 or math.ceil(rows / fewer) * width > budget
    else:
        assert sizes == [1] * rows
    tensor = torch.arange(rows * width).view(rows, width)
    parts = [piece.of(tensor) for block in blocks for piece in block.pieces]
    assert torch.equal(torch.cat(parts), tensor)
    assert [tuple(part.shape) for part in parts] == [piece.shape for block in blocks for piece in block.pieces]


def test_entries_of_a_vector_are_rows():
    blocks = cut_blocks({"norm": (10,)}, budget=4, layer_of=layer_of)
    assert [block.pieces[0].rows for block in blocks] == [(0, 3), (3, 6), (6, 10)]
    assert blocks[0].pieces[0].of(torch.arange(10)).tolist() == [0, 1, 2]


def test_keys_name_parameter_and_rows():
    assert Piece("w", (4, 2)).key == "w"
    assert Piece("w", (3, 2), (1, 4)).key == "w@1:4"
    assert Block("b", (Piece("w", (4, 2)), Piece("v", (3,)))).size == 11
