"""Whole runs of BlockLLM: switches that must not change numbers, state that stays bounded, events that say all."""

import pytest

from blockllm_cli.errors import RecipeError
from support.tiny import equal_rows, equal_tensors

BLOCKLLM = "blockllm:patience=4,max_interval=6"
LAYERWISE = "blockllm:patience=4,max_interval=6,inactive=normalized"


def selections(run):
    return [event for event in run.events if event["kind"] == "selection"]


@pytest.mark.parametrize("method", [BLOCKLLM, BLOCKLLM + ',always=["head"],mask=row,density=0.3', LAYERWISE])
def test_activation_checkpointing_and_workers_change_no_number_r19(tiny, method):
    plain = tiny.run(method=method)
    assert len(selections(plain)) >= 3
    for switch in ("model.checkpoint_activations=true", "data.workers=2"):
        other = tiny.run(switch, method=method)
        equal_rows(plain.metrics, other.metrics)
        equal_tensors(plain.tensors(), other.tensors())
        assert plain.events == other.events


@pytest.mark.parametrize("layerwise", ["true", "false"])
@pytest.mark.parametrize("micro_rows", [8, 2])
def test_layerwise_or_not_updates_and_rates_are_the_same_r03(tiny, layerwise, micro_rows):
    sets = ("schedule.steps=12", "schedule.warmup=2", f"batch.micro_rows={micro_rows}")
    method = f"{LAYERWISE},layerwise={layerwise}"
    if layerwise == "true" and micro_rows == 2:
        with pytest.raises(RecipeError, match="layerwise"):
            tiny.run(*sets, method=method)
        return
    reference = tiny.run("schedule.steps=12", "schedule.warmup=2", method=LAYERWISE)
    run = tiny.run(*sets, method=method)
    assert run.column("train/learning_rate") == reference.column("train/learning_rate")
    for name, tensor in reference.tensors().items():
        assert (tensor - run.tensors()[name]).abs().max() < 1e-5, name


def test_layerwise_with_skipping_is_refused_r03(tiny):
    with pytest.raises(RecipeError, match="on_nonfinite"):
        tiny.run("run.on_nonfinite=skip", method=f"{LAYERWISE},layerwise=true")
    assert tiny.run("run.on_nonfinite=skip", method=LAYERWISE).summary["status"] == "completed"


def test_state_stays_within_the_budget_over_six_selections_r17(tiny):
    run = tiny.run("schedule.steps=45", method=BLOCKLLM)
    assert len(selections(run)) >= 6
    event = selections(run)[0]
    assert event["kept"] <= event["budget"] == int(0.1 * event["candidates"] + 1e-9)
    always = 2 * 320 * 32 + 32 + 4 * 32  # embedding, head, the final norm, and at most the norms of both layers
    state = run.column("memory/optimizer_state_bytes") or [run.summary["memory"]["optimizer_state"]]
    assert max(state) <= 2 * 4 * (event["budget"] + always)
    assert run.summary["memory"]["optimizer_state"] <= run.summary["planned_memory"]["optimizer_state"]


def test_every_selection_says_why_what_and_how_often(tiny):
    run = tiny.run("schedule.steps=40", method=BLOCKLLM)
    events = selections(run)
    assert [event["number"] for event in events] == list(range(1, len(events) + 1))
    assert events[0]["cause"] == "first"
    assert {event["cause"] for event in events[1:]} <= {"patience", "max_interval"}
    visits = {}
    for event in events:
        scores = [block["score"] for block in event["blocks"]]
        assert scores == sorted(scores, reverse=True)
        assert sum(block["kept"] for block in event["blocks"]) == event["kept"]
        sizes = [block["size"] for block in event["blocks"] + event["others"]]
        assert sum(sizes) == event["candidates"]
        assert max(sizes) <= event["budget"]  # larger tensors are cut into slices
        for block in event["blocks"]:
            visits[block["name"]] = visits.get(block["name"], 0) + 1
            assert block["enters"] == event["step"]
        for block in event["blocks"] + event["others"]:
            assert block["visits"] == visits.get(block["name"], 0)


def test_every_tensor_moves_in_a_cycle_r18(tiny):
    method = "blockllm:score=cyclic,sparsity=0.5,max_interval=2,patience=100"
    assert tiny.run(method=method).summary["unmoved"] == []
    few = tiny.run("schedule.steps=2", "schedule.warmup=1", method="blockllm:score=cyclic")
    assert "model.layers.0.self_attn.q_proj.weight" not in few.summary["unmoved"]
    assert "model.layers.1.mlp.down_proj.weight" in few.summary["unmoved"]
