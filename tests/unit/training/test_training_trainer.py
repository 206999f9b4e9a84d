"""The loop itself, on rows made by hand."""

import numpy as np
import pytest
import torch

from blockllm_cli.data.rows import PADDING, Rows
from blockllm_cli.data.stream import Taken
from blockllm_cli.errors import DivergedError, InputError, StopRequested
from blockllm_cli.methods.base import Setting
from blockllm_cli.methods.registry import method_class
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.llama import build_model
from blockllm_cli.optim.precision import precision_of
from blockllm_cli.training.schedule import Schedule
from blockllm_cli.training.trainer import Trainer, TrainerSettings, TrainState

LENGTH = 251
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=88,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=300,
)
CPU = torch.device("cpu")


class Stream:
    """Stands in for RowStream: the same updates each time, then `fails` or the end."""

    def __init__(self, updates, fails=None):
        self.updates = list(updates)
        self.fails = fails
        self.taken = 0
        self.events_at_end = [{"kind": "exhausted", "rows_dropped": 0}]
        self.waited_seconds = 0.0

    def take(self, count):
        if self.taken == len(self.updates):
            if self.fails is not None:
                raise self.fails
            return None
        rows = self.updates[self.taken]
        assert len(rows) == count
        self.taken += 1
        return Taken(rows, [])

    def state(self):
        return {"taken": self.taken}


class NoProbe:
    def mark(self, phase, gradient_bytes):
        pass


def rows_with(targets, seed):
    """One row per entry of `targets`, with that many target tokens."""
    draw = np.random.default_rng(seed)
    pieces = np.full((len(targets), LENGTH), PADDING, np.int32)
    documents = np.full((len(targets), LENGTH), PADDING, np.int32)
    for row, count in enumerate(targets):
        pieces[row, : count + 1] = draw.integers(0, 300, count + 1)
        documents[row, : count + 1] = 0
    return Rows(pieces, documents, [(f"x:{row}",) for row in range(len(targets))], LENGTH)


def trainer(
    stream,
    *,
    rows=32,
    micro=32,
    clip=0.0,
    steps=4,
    on_nonfinite="stop",
    should_stop=lambda: False,
    method="adamw",
    **keys,
):
    model = build_model(CONFIG, seed=1, dtype=torch.float32, device=CPU)
    kind = method_class(method)
    method = kind(kind.Options(**keys), Setting(0, precision_of("fp32"), micro_batches=rows // micro))
    method.prepare(model)
    settings = TrainerSettings(steps, rows, micro, 1e-3, 1e-3, clip, on_nonfinite, 1, CPU)
    state = TrainState(0, 0, 0, b"", np.zeros(300, np.int64), stream.state())
    schedule = Schedule("cosine", steps, 1, 0.1)
    return Trainer(model, method, schedule, stream, settings, state, probe=NoProbe(), should_stop=should_stop)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_32_rows_at_once_are_8_times_4_with_1_to_250_targets(clip):
    """A micro-batch without any target is among them; loss to 1e-6, weights to 1e-5."""
    targets = [1, 250, 3, 120, 0, 0, 0, 0, *np.linspace(1, 250, 24).astype(int)]
    runs = []
    for micro in (32, 4):
        stream = Stream([rows_with(targets, seed) for seed in range(3)])
        running = trainer(stream, micro=micro, clip=clip, steps=3)
        reports = list(running.updates())
        runs.append((reports, {name: p.detach().clone() for name, p in running.model.named_parameters()}))
    (whole, weights), (cut, cut_weights) = runs
    for one, other in zip(whole, cut, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-6)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)
        assert one.targets == sum(targets)
    assert whole[0].gradient_norm > 0.05, "the clip must have acted"
    for name, tensor in weights.items():
        torch.testing.assert_close(cut_weights[name], tensor, rtol=0, atol=1e-5)


def test_a_stop_between_micro_batches_leaves_the_last_finished_update():
    calls = iter(range(100))
    running = trainer(
        Stream([rows_with([5] * 4, seed) for seed in range(4)]),
        rows=4,
        micro=2,
        should_stop=lambda: next(calls) >= 5,
    )
    before = None
    with pytest.raises(StopRequested):
        for report in running.updates():
            before = {name: p.detach().clone() for name, p in running.model.named_parameters()}
            assert report.step == running.state.step
    assert running.state.step == 2
    assert running.state.data == {"taken": 2}
    assert running.state.tokens == 2 * 4 * 5
    for name, parameter in running.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_a_failure_of_the_next_rows_does_not_swallow_the_report_before_it():
    running = trainer(Stream([rows_with([5] * 4, 0)], fails=InputError("broken file")), rows=4, micro=4)
    reports = []
    with pytest.raises(InputError, match="broken file"):
        for report in running.updates():
            reports.append(report)
    assert [report.step for report in reports] == [1]
    assert not reports[0].is_last


def test_the_last_update_knows_that_it_is_the_last():
    reports = list(trainer(Stream([rows_with([5] * 4, seed) for seed in range(9)]), rows=4, micro=4).updates())
    assert [report.is_last for report in reports] == [False, False, False, True]
    short = list(trainer(Stream([rows_with([5] * 4, seed) for seed in range(2)]), rows=4, micro=4).updates())
    assert [report.is_last for report in short] == [False, True]
    assert short[-1].events == [{"kind": "exhausted", "rows_dropped": 0}]


def test_less_data_than_one_update_is_an_error():
    with pytest.raises(InputError, match=r"batch\.rows = 4"):
        next(trainer(Stream([]), rows=4, micro=4).updates())


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_nothing_is_written_from_what_is_not_finite(on_nonfinite):
    running = trainer(
        Stream([rows_with([5] * 4, seed) for seed in range(4)]), rows=4, micro=4, on_nonfinite=on_nonfinite
    )
    with torch.no_grad():
        running.model.head_weight[7] = float("nan")
    before = {name: p.detach().clone() for name, p in running.model.named_parameters()}
    if on_nonfinite == "stop":
        with pytest.raises(DivergedError, match="update 1: loss nan"):
            list(running.updates())
    else:
        assert all(report.skipped for report in running.updates())
    for name, parameter in running.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())


def test_a_rule_inside_the_backward_pass_writes_nothing_where_the_loss_is_not_finite():
    """The loss is looked at before the backward pass, which would have moved what lies above the first bad product."""
    running = trainer(
        Stream([rows_with([5] * 4, seed) for seed in range(2)]),
        rows=4,
        micro=4,
        steps=2,
        method="blockllm",
        inactive="sign",
        always=[],
    )
    updates = running.updates()
    next(updates)
    with torch.no_grad():
        running.model.head_weight[7] = float("nan")
    before = {name: p.detach().clone() for name, p in running.model.named_parameters()}
    with pytest.raises(DivergedError, match=r"gradient norm not taken; this update changed no weight"):
        next(updates)
    for name, parameter in running.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_micro_batch_without_a_target_costs_no_pass(monkeypatch):
    running = trainer(Stream([rows_with([5, 5, 0, 0, 5, 5], 0)]), rows=6, micro=2, steps=1)
    passed = []
    loss = running.model.loss
    monkeypatch.setattr(
        running.model, "loss", lambda batch, **keys: passed.append(batch.num_targets) or loss(batch, **keys)
    )
    list(running.updates())
    assert passed == [10, 10]
