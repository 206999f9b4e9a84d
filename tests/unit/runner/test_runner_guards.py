"""What a run holds a method to: no more memory than planned (exit code 7), and every trained tensor moves (R18)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch

from blockllm_cli.app import main
from blockllm_cli.errors import GuardError, RecipeError
from blockllm_cli.footprint import TensorPlan
from blockllm_cli.methods import registry
from blockllm_cli.methods.adamw import AdamW, AdamWOptions
from blockllm_cli.methods.base import Held
from support.tiny import equal_rows

LAZY = "model.layers.1.self_attn.q_proj.weight"


class LiarOptions(AdamWOptions):
    lie: str = "none"


class Liar(AdamW):
    """AdamW that plans too little, takes more than it should, forgets a tensor, or refuses, as `lie` says."""

    name = "liar"
    Options = LiarOptions

    def __init__(self, options: LiarOptions, setting) -> None:
        super().__init__(options, setting)
        self.lie = options.lie
        self.taken: list[torch.Tensor] = []

    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorPlan]:
        rows = shapes["model.embed_tokens.weight"][0]
        if self.lie == "refuses":
            raise RecipeError(f'method.lie = "refuses": {rows} rows are too few')
        plans = super().plan(shapes)
        small = {"state": "optimizer_state", "gradients": "gradients"}.get(self.lie)
        return [replace(plan, dtype="bfloat16") if plan.category == small else plan for plan in plans]

    def update(self, step, rates, chosen, loss, *, count_unchanged=False):
        if self.lie == "grows" and step == 3:
            self.taken.append(torch.zeros(2))
        if self.lie == "forgets":
            chosen = {name: gradient for name, gradient in chosen.items() if name != LAZY}
        return super().update(step, rates, chosen, loss, count_unchanged=count_unchanged)

    def held(self) -> Iterator[Held]:
        yield from super().held()
        for tensor in self.taken:
            yield Held("extra", "optimizer_state", tensor)


@pytest.fixture(autouse=True)
def with_liar(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("liar", f"{__name__}:Liar", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [point] if group == registry.GROUP else [])


SHORT = ("schedule.steps=5", "schedule.warmup=0")


@pytest.mark.parametrize(
    ("lie", "category", "when", "excess"),
    [
        ("state", "optimizer_state", "before the first update of this process", None),
        ("gradients", "gradients", "after a backward pass of update 1", None),
        ("grows", "optimizer_state", "after the writes of update 3", 8),
    ],
)
def test_a_method_that_holds_more_than_it_planned_ends_with_7(tiny, lie, category, when, excess):
    with pytest.raises(GuardError) as caught:
        tiny.run(*SHORT, "checkpoint.every=1", method=f"liar:lie={lie}")
    left = tiny.newest()
    planned = left.summary["planned_memory"][category]
    held = 2 * planned if excess is None else planned + excess
    assert f"method liar holds more than it planned: {category} are {held:,} bytes {when}" in str(caught.value)
    assert f"{planned:,} in plan.json" in str(caught.value)
    assert "take another method" in str(caught.value)
    assert (left.summary["status"], left.summary["exit_code"]) == ("failed", 7)
    assert left.summary["message"] == str(caught.value)
    assert left.summary["unmoved"] is None
    if lie == "grows":
        assert left.summary["memory"][category] == held
        assert [path.name for path in sorted((left.folder / "checkpoints").glob("step-*"))] == [
            "step-00000001",
            "step-00000002",
        ]


def test_the_command_ends_with_7(tiny, capsys):
    assert main(["pretrain", str(tiny.recipe), "--method", "liar:lie=grows"]) == 7
    assert "error: method liar holds more than it planned" in capsys.readouterr().err


def test_an_honest_plan_is_no_obstacle(tiny):
    honest, plain = tiny.run(*SHORT, method="liar"), tiny.run(*SHORT)
    assert honest.summary["status"] == "completed"
    equal_rows(honest.metrics, plain.metrics)


@pytest.mark.parametrize(
    "options",
    [
        "sparsity=0.5,max_interval=5,patience=3",
        "variant=paper,patience=2",
        "mask=entry,density=0.3,sparsity=0.8,max_interval=4,state=offload",
        "mask=row,density=0.5,sparsity=0.5,max_interval=5,inactive=normalized",
    ],
)
def test_blockllm_keeps_to_its_plan_through_selections_and_probes(tiny, options):
    """The scouting pass, waves of entering blocks and sketches are in the plan, which is an upper bound."""
    result = tiny.run("batch.micro_rows=4", method=f"blockllm:{options}")
    assert sum(event["kind"] == "selection" for event in result.events) > 1
    memory, planned = result.summary["memory"], result.summary["planned_memory"]
    assert all(memory[name] <= planned[name] for name in memory if memory[name] is not None)
    if "mask" not in options:  # what is kept whole, or sketched, is planned to the byte
        assert memory["gradients"] == planned["gradients"]


def test_a_plan_that_refuses_ends_before_a_folder_exists(tiny, capsys):
    expected = '--method liar:lie=refuses: method.lie = "refuses": 320 rows are too few'
    with pytest.raises(RecipeError) as caught:
        tiny.run(method="liar:lie=refuses")
    assert str(caught.value) == expected
    assert main(["validate", str(tiny.recipe), "--method", "liar:lie=refuses"]) == 2
    assert expected in capsys.readouterr().err
    # Where the shapes are known when the tokenizer has been read only, so is the refusal.
    text = tiny.recipe.read_text(encoding="utf-8").replace("vocab_size = 320\n", "")
    tiny.recipe.write_text(text, encoding="utf-8")
    assert main(["validate", str(tiny.recipe), "--method", "liar:lie=refuses"]) == 0
    with pytest.raises(RecipeError) as caught:
        tiny.run(method="liar:lie=refuses")
    assert str(caught.value) == expected
    assert not (tiny.folder / "runs").exists()


def test_r18_a_tensor_that_never_moved_is_named(tiny):
    lazy = tiny.run(*SHORT, method="liar:lie=forgets")
    assert lazy.summary["unmoved"] == [LAZY]
    note = f"note: 1 of the tensors that liar trains still have the values they began with: {LAZY}"
    assert note in lazy.output
    assert note in (lazy.folder / "log.txt").read_text(encoding="utf-8")
    cut = tiny.run(*SHORT, method="liar:lie=forgets", stop_after=2)
    assert cut.summary["unmoved"] == [LAZY]
    assert tiny.run(*SHORT, method="liar:lie=forgets", resume=cut.folder).summary["unmoved"] == [LAZY]


@pytest.mark.parametrize("method", ["adamw", "frozen", "sgd"])
def test_r18_a_method_that_moves_what_it_trains_is_not_mentioned(tiny, method):
    result = tiny.run(*SHORT, method=method)
    assert result.summary["unmoved"] == []
    assert "values they began with" not in result.output


def test_r18_norms_that_bf16_cannot_move_are_told(tiny):
    result = tiny.run(*SHORT, "run.precision=bf16", "schedule.learning_rate=1e-4")
    norms = [name for name in result.tensors() if name.endswith("norm.weight")]
    assert set(norms) == set(result.summary["unmoved"])
    assert f"note: {len(norms)} of the tensors" in result.output
    assert ", ... (" in result.output
