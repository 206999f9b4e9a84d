"""The picture and the table of selections."""

import re
from xml.etree import ElementTree

from blockllm_cli.tracking.selection_chart import COLUMNS, chart, table_rows
from blockllm_cli.tracking.selections import BlockHistory, Selection, SelectionTable, TakenBlock


def table(blocks: list[BlockHistory], steps: list[int], last: int) -> SelectionTable:
    taken = TakenBlock(name="b", size=4, score=None, norm=None, age=None, kept=4, enters=1)
    selections = tuple(
        Selection(step=step, cause="first", budget=4, candidates=8, kept=4, share=1.0, blocks=(taken,), others=())
        for step in steps
    )
    return SelectionTable(selections, tuple(blocks), last)


A = BlockHistory("model.a<b>", 4, 2, ((1, 4),), 0.5, 3)
B = BlockHistory("b", 4, 0, (), None, None)


def test_a_row_of_the_table_says_how_long_a_block_trained():
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table_rows(table([A, B], [1], 8))]
    assert rows[0] == {
        "block": "model.a<b>",
        "size": 4,
        "visits": 2,
        "updates": 4,
        "share_of_updates": 0.5,
        "norm": 0.5,
        "norm_measured_at": 3,
    }
    assert (rows[1]["updates"], rows[1]["norm"]) == (0, None)


def test_the_picture_is_one_element_of_xml_with_a_cell_where_a_block_trained():
    picture = ElementTree.fromstring(chart(table([A, B], [1, 5], 8)))
    texts = [element.text for element in picture.iter() if element.text and element.text.strip()]
    assert "a<b> (2)" in texts
    assert "b (0)" in texts
    paths = {element.get("fill-opacity"): element.get("d") for element in picture.iter() if element.get("fill-opacity")}
    assert list(paths) == ["1.0"]
    assert re.findall(r"M(\d+) (\d+)", paths["1.0"]) == [("300", "1"), ("304", "1"), ("308", "1"), ("312", "1")]
    ticks = [element.get("d") for element in picture.iter() if element.get("stroke")]
    assert [int(re.match(r"M(\d+)", tick)[1]) for tick in ticks] == [302, 318]


def test_a_block_that_trained_in_part_of_a_stretch_is_paler():
    half = BlockHistory("h", 4, 1, ((1, 1),), None, None)
    picture = chart(table([half], [1], 400))
    assert 'fill-opacity="0.5"' in picture
    assert 'fill-opacity="1.0"' not in picture


def test_a_picture_of_many_blocks_shows_the_most_visited():
    many = [BlockHistory(f"block{index}", 4, index, ((1, 1000),), None, None) for index in range(600)]
    picture = chart(table(many, [1], 1000))
    assert picture.count("block") == 400
    assert "block599 " in picture
    assert "block199 " not in picture
    assert len(picture) < 3_000_000
