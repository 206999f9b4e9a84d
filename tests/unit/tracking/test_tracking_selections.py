"""The table of selections: spans, visits, norms, order, bins, and what a damaged file is answered with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockllm_cli.errors import InputError
from blockllm_cli.tracking.selections import (
    BlockHistory,
    bins_of,
    plain,
    read_selections,
    selections_of,
    table_of,
)

SOURCE = Path("events.jsonl")
NAMES = ("a.weight", "b.weight", "c.weight")


def seen(name: str, *, norm: float | None = None, age: int | None = None, **more) -> dict:
    return {"name": name, "size": 10, "score": norm, "norm": norm, "age": age, "visits": 0, **more}


def event(step: int, taken: dict[str, int], *, cause: str = "patience", **norms: tuple[float, int]) -> dict:
    """A selection that takes `taken`, block -> update in which it enters; `norms` are block -> (norm, age)."""

    def known(name: str) -> dict:
        norm, age = norms.get(name.partition(".")[0], (None, None))
        return {"norm": norm, "age": age}

    return {
        "step": step,
        "kind": "selection",
        "number": 1,
        "cause": cause,
        "budget": 20,
        "candidates": 30,
        "kept": 10 * len(taken),
        "share": 1.0,
        "blocks": [seen(name, kept=10, enters=enters, **known(name)) for name, enters in taken.items()],
        "others": [seen(name, **known(name)) for name in NAMES if name not in taken],
    }


def history(rows: list[dict], name: str, *, last: int = 12) -> BlockHistory:
    table = table_of(selections_of(rows, SOURCE), last=last, parameters=NAMES)
    return next(block for block in table.blocks if block.name == name)


ROWS = [
    {"step": 1, "kind": "validation_set"},
    event(1, {"b.weight": 1, "c.weight": 3}, cause="first", a=(0.5, 0), b=(4.0, 0)),
    event(5, {"b.weight": 5}, a=(0.25, 2)),
    event(9, {"a.weight": 9, "c.weight": 14}, b=(3.0, 1)),
]


def test_a_block_trains_from_its_entry_to_the_next_selection():
    assert history(ROWS, "a.weight").spans == ((9, 12),)
    assert history(ROWS, "b.weight").spans == ((1, 8),), "two in a row are one stretch"
    assert history(ROWS, "c.weight").spans == ((3, 4),), "what would enter after the end never trained"
    assert history(ROWS, "c.weight", last=15).spans == ((3, 4), (14, 15))


def test_a_block_still_waiting_when_the_next_selection_comes_never_trained():
    rows = [event(1, {"a.weight": 1, "b.weight": 4}), event(4, {"a.weight": 4})]
    assert history(rows, "b.weight").spans == ()
    assert history(rows, "b.weight").visits == 1


def test_visits_and_the_latest_norm_with_its_update():
    found = {name: history(ROWS, name) for name in NAMES}
    assert [found[name].visits for name in NAMES] == [1, 2, 2]
    assert (found["a.weight"].norm, found["a.weight"].measured) == (0.25, 3)
    assert (found["b.weight"].norm, found["b.weight"].measured) == (3.0, 8)
    assert (found["c.weight"].norm, found["c.weight"].measured) == (None, None)


def test_causes_are_counted_and_the_end_is_at_least_the_last_selection():
    table = table_of(selections_of(ROWS, SOURCE), last=3)
    assert table.causes == {"patience": 2, "first": 1}
    assert table.last == 9


def test_blocks_are_in_the_order_of_the_model():
    parameters = [
        "model.embed_tokens.weight",
        *(f"model.layers.{n}.self_attn.{p}_proj.weight" for n in (0, 1, 10) for p in "qk"),
        "lm_head.weight",
    ]
    ordered = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight@0:8",
        "model.layers.0.self_attn.q_proj.weight@8:16",
        "model.layers.0.self_attn.q_proj.weight@16:24",
        "model.layers.1",
        "10.*k_proj",
        "lm_head.weight",
        "no parameter",
        "and [no expression",
    ]
    row = event(1, dict.fromkeys(["no parameter", *reversed(ordered[:-2]), "and [no expression"], 1)) | {"others": []}
    table = table_of(selections_of([row], SOURCE), last=1, parameters=parameters)
    assert [block.name for block in table.blocks] == ordered


def test_the_most_visited_stay_in_the_models_order():
    table = table_of(selections_of(ROWS, SOURCE), last=12, parameters=NAMES)
    assert [block.name for block in table.most_visited(2)] == ["b.weight", "c.weight"]
    assert [block.name for block in table.most_visited(1)] == ["b.weight"]
    assert table.most_visited(9) == table.blocks


@given(
    starts=st.sets(st.integers(1, 40), min_size=1, max_size=8),
    data=st.data(),
    last=st.integers(1, 60),
    width=st.integers(1, 50),
)
def test_bins_and_spans_agree_with_going_through_every_update(starts, data, last, width):
    steps = sorted(starts)
    last = max(last, steps[-1])
    rows = []
    for step in steps:
        taken = data.draw(st.sets(st.sampled_from(NAMES), min_size=1))
        rows.append(event(step, {name: step + data.draw(st.integers(0, 4)) for name in taken}))
    bins = bins_of(last, width)
    assert len(bins) <= width
    assert [update for first, stop in bins for update in range(first, stop + 1)] == list(range(1, last + 1))
    table = table_of(selections_of(rows, SOURCE), last=last, parameters=NAMES)
    for block in table.blocks:
        trained = set()
        for update in range(1, last + 1):
            newest = [row for row in rows if row["step"] <= update][-1:]
            taken = {b["name"]: b["enters"] for row in newest for b in row["blocks"]}
            if taken.get(block.name, last + 1) <= update:
                trained.add(update)
        for first, stop in bins:
            assert block.updates_within((first, stop)) == len(trained & set(range(first, stop + 1)))


def test_everything_is_plain_json():
    table = table_of(selections_of(ROWS, SOURCE), last=12, parameters=NAMES)
    told = json.loads(json.dumps(plain(table), allow_nan=False))
    assert told["updates"] == 12
    assert told["selections"][0]["blocks"] == ["b.weight", "c.weight"]
    assert told["blocks"][1] == {
        "name": "b.weight",
        "size": 10,
        "visits": 2,
        "updates": 8,
        "spans": [[1, 8]],
        "norm": 3.0,
        "measured": 8,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": None}, "row 2: not a selection: blocks: "),
        ({"step": 0}, "row 2: not a selection: step: "),
        ({"others": [{"name": "a"}]}, "row 2: not a selection: others.0.size: Field required"),
        ({"blocks": [seen("a.weight", kept=-1, enters=1)]}, "row 2: not a selection: blocks.0.kept: "),
    ],
)
def test_a_selection_that_lacks_something_is_named(change: dict, message: str):
    rows = [{"kind": "skip"}, event(3, {"a.weight": 3}) | change]
    with pytest.raises(InputError, match=r"^events\.jsonl, row 2: ") as caught:
        selections_of(rows, SOURCE)
    assert message in str(caught.value)


def test_rows_out_of_order_or_no_objects_are_named():
    with pytest.raises(InputError, match="row 2: the selection of update 5 comes after that of 5"):
        selections_of([event(5, {"a.weight": 5}), event(5, {"a.weight": 5})], SOURCE)
    with pytest.raises(InputError, match="row 1: not an object"):
        selections_of([3], SOURCE)


def test_a_half_written_last_line_is_passed_over_and_a_damaged_one_named(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    whole = json.dumps(event(1, {"a.weight": 1}))
    path.write_text(f"{whole}\n{whole[:40]}", encoding="utf-8")
    assert len(read_selections(path)) == 1
    path.write_text(f"{whole[:40]}\n{whole}\n{whole}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"events\.jsonl, line 1: not JSON"):
        read_selections(path)
    assert read_selections(tmp_path / "none.jsonl") == []
