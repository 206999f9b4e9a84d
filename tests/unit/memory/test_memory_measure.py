import torch

from blockllm_cli.footprint import CATEGORIES
from blockllm_cli.memory.measure import MemoryMeter, device_peaks, process_memory
from support.tiny import TinyRuns


def test_counted_bytes_are_the_planned_ones(tiny: TinyRuns):
    """For the dense methods plan and count agree to the byte, in every precision."""
    for precision in ("fp32", "bf16", "bf16_master", "bf16_papers"):
        for micro in (8, 4):
            summary = tiny.run(
                f"run.precision={precision}", "schedule.steps=2", "schedule.warmup=0", f"batch.micro_rows={micro}"
            ).summary
            assert summary["memory"] == summary["planned_memory"], (precision, micro)


def test_categories_by_hand(tiny: TinyRuns):
    summary = tiny.run("schedule.steps=2", "schedule.warmup=0", "run.precision=bf16_master").summary
    parameters = summary["parameters"]
    assert parameters == 2 * 320 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 88 + 2 * 32) + 32
    memory = summary["memory"]
    assert list(memory) == list(CATEGORIES)
    assert memory["weights"] == 2 * parameters
    assert memory["master_weights"] == 4 * parameters
    assert memory["gradients"] == 4 * parameters
    assert 8 * parameters <= memory["optimizer_state"] < 8 * parameters + 1000
    assert memory["activations"] is None
    assert summary["state_entries"] == summary["trainable_entries"] == parameters


def test_frozen_holds_state_for_what_it_trains_only(tiny: TinyRuns):
    summary = tiny.run("schedule.steps=2", "schedule.warmup=0", method="frozen").summary
    dense = 2 * 320 * 32 + 2 * 2 * 32 + 32
    assert summary["state_entries"] == dense
    assert summary["memory"]["gradients"] == 4 * dense
    assert summary["memory"] == summary["planned_memory"]


def test_the_largest_figure_stays_and_survives_a_resume():
    class Holder:
        def held(self):
            return iter(())

    model = torch.nn.Linear(4, 4)
    meter = MemoryMeter(model, Holder())
    meter.mark("backward", 1000)
    meter.mark("update", 10)
    assert meter.by_category()["gradients"] == 1000
    assert MemoryMeter(model, Holder(), peaks=meter.peaks).by_category()["gradients"] == 1000
    assert meter.by_category()["weights"] == 80


def test_the_process_knows_its_own_size():
    memory = process_memory()
    assert 10 * 2**20 < memory["rss_bytes"] <= memory["peak_rss_bytes"] * 1.01
    assert device_peaks(torch.device("cpu")) == {"peak_allocated_bytes": None, "peak_reserved_bytes": None}
