"""Time of an update: BlockLLM at several budgets against AdamW, a frozen body, and a plain loop with torch's AdamW.

    OMP_NUM_THREADS=1 python bench/step_time.py
    OMP_NUM_THREADS=1 python bench/step_time.py --minutes 10 --threads 1 --precision bf16

T_d is the update of adamw, T_0 that of frozen (embedding, head and norms train, which is what BlockLLM trains beside
its budget, norms of idle layers excepted), S the share of the candidates' entries that BlockLLM does not train. The
bound is T_d - 0.8 S (T_d - T_0): four fifths of the time that these entries could save are saved; `saved` is the share
that was. Beside it stands (2 + (1 - S)) / 3, the share of the products of a dense update that is left if nothing but
products of weights took time and the head were free.

All variants run in turn, an update each, in the package's own training loop, so that a busy machine slows all alike;
figures are the fastest update of each, those that probe and those that do not weighted as they come, with the median
beside it. Selecting and probing are measured enlarged, since
they are below the noise as they are: a selection in every update, a quarter of all blocks probed in every update.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from blockllm_cli.data.batches import batch_of
from blockllm_cli.data.rows import Rows
from blockllm_cli.data.stream import Taken
from blockllm_cli.methods.base import Rates, Setting
from blockllm_cli.methods.registry import method_class
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.llama import LlamaForCausalLM, build_model
from blockllm_cli.optim.precision import PrecisionName, precision_of
from blockllm_cli.training.schedule import Schedule
from blockllm_cli.training.trainer import StepReport, Trainer, TrainerSettings, TrainState

CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
)
BLOCKS = 7 * CONFIG.num_hidden_layers
RATE = 1e-4
PATIENCE = 100
WARM_UP = 3  # updates; BlockLLM scouts and selects in its first
PROBED = BLOCKS // 4
LIMITS = {"bound": 0.8, "plain": 1.05, "choosing": 0.02}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "frozen": ("frozen", {}),
    "tensor, s 0.5": ("blockllm", {"sparsity": 0.5}),
    "tensor, s 0.9": ("blockllm", {"sparsity": 0.9}),
    "tensor, s 0.95": ("blockllm", {"sparsity": 0.95}),
    "4 of 8 layers": ("blockllm", {"sparsity": 0.5, "granularity": "layer"}),
    "2 of 8 layers": ("blockllm", {"sparsity": 0.75, "granularity": "layer"}),
    "1 of 8 layers": ("blockllm", {"sparsity": 0.875, "granularity": "layer"}),
}
BASE = "tensor, s 0.9"
ENLARGED: dict[str, tuple[str, dict[str, Any]]] = {
    "selecting": ("blockllm", {"sparsity": 0.9, "max_interval": 1}),
    "probing": ("blockllm", {"sparsity": 0.9, "probe": PROBED, "probe_every": 1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="for each precision, set-up not counted")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="positions of a row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    slots = options.rows * options.length
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {slots} targets an update, {_described()}")
    for precision in options.precision:
        compare(precision, options.minutes, options.rows, options.length)


def _described() -> str:
    return (
        f"{CONFIG.num_parameters / 1e6:.1f}M parameters, hidden {CONFIG.hidden_size}, "
        f"{CONFIG.num_hidden_layers} layers, vocabulary {CONFIG.vocab_size}"
    )


@dataclass
class Timed:
    """One variant: how to make its next update, and the seconds of those made.

    Attributes:
        update: makes one update and returns its seconds.
        period: updates from one that probes to the next; 1 if all are alike.
        made: updates made, the warm-up included.
        seconds: of each update after the warm-up, those that probe under True.
        untrained: share of the candidates' entries that does not train, once known.
        first_seconds: of the update that scouts and selects.
    """

    update: Callable[[], float]
    period: int = 1
    made: int = 0
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    untrained: float | None = None
    first_seconds: float = 0.0

    def warm_up(self) -> None:
        """Make the first updates."""
        self.first_seconds = self.update()
        for _ in range(WARM_UP - 1):
            self.update()
        self.made = WARM_UP

    def run(self) -> None:
        """Make an update and note its time."""
        self.made += 1
        self.seconds[self.made % self.period == 0].append(self.update())

    @property
    def best(self) -> float:
        """Seconds of an update, from the fastest that probes and the fastest that does not."""
        probing, steady = (min(self.seconds[which], default=None) for which in (True, False))
        if probing is None or steady is None:
            return probing or steady or float("nan")
        return (probing + (self.period - 1) * steady) / self.period

    @property
    def median(self) -> float:
        """Seconds of the median update."""
        return statistics.median(self.seconds[True] + self.seconds[False])


def compare(precision: PrecisionName, minutes: float, rows: int, length: int) -> None:
    """Run all variants in one precision and print what they came to."""
    timed = {name: _method(*variant, precision, rows, length) for name, variant in (VARIANTS | ENLARGED).items()}
    timed["plain loop"] = Timed(_plain_loop(precision, rows, length))
    for each in timed.values():
        each.warm_up()
    end = time.perf_counter() + 60 * minutes
    while time.perf_counter() < end:
        for each in timed.values():
            each.run()
    _print_table(precision, timed)
    _print_shares(timed)


class RandomRows:
    """Rows of random ids, the same for every variant: all that the trainer asks of a stream."""

    events_at_end: tuple[()] = ()

    def __init__(self, length: int) -> None:
        self._draw = np.random.default_rng(0)
        self._length = length

    def take(self, count: int) -> Taken:
        """`count` rows; every position has a target."""
        pieces = self._draw.integers(CONFIG.vocab_size, size=(count, self._length + 1), dtype=np.int32)
        return Taken(Rows(pieces, np.zeros_like(pieces), [("",)] * count, self._length), [])

    def state(self) -> dict[str, Any]:
        """Nothing is resumed."""
        return {}


class NoProbe:
    """Memory is measured elsewhere."""

    def mark(self, phase: str, gradient_bytes: int) -> None:
        """Ignore a phase border."""


def _model(precision: PrecisionName) -> LlamaForCausalLM:
    return build_model(CONFIG, seed=0, dtype=precision_of(precision).weights)


def _method(name: str, options: dict[str, Any], precision: PrecisionName, rows: int, length: int) -> Timed:
    """A method in the package's training loop."""
    kind = method_class(name)
    if name == "blockllm":
        options = {"patience": PATIENCE * 1000, **options}
    method = kind(kind.Options(**options), Setting(0, precision_of(precision), peak=Rates(RATE, RATE)))
    model = _model(precision)
    method.prepare(model)
    settings = TrainerSettings(
        steps=10**9,
        rows=rows,
        micro_rows=rows,
        learning_rate=RATE,
        dense_rate=RATE,
        clip=0.0,
        on_nonfinite="stop",
        log_every=10**9,
        device=torch.device("cpu"),
    )
    stream: Any = RandomRows(length)
    state = TrainState(0, 0, 0, b"", np.zeros(CONFIG.vocab_size, dtype=np.int64), {})
    schedule = Schedule("constant", settings.steps)
    trainer = Trainer(model, method, schedule, stream, settings, state, probe=NoProbe(), should_stop=lambda: False)
    blocks = CONFIG.num_hidden_layers if options.get("granularity") == "layer" else BLOCKS
    return _stepwise(trainer.updates(), _probe_every(blocks) if name == "blockllm" else 1)


def _probe_every(blocks: int) -> int:
    """Updates between two probes by the default rule."""
    return -(-34 // blocks)


def _stepwise(reports: Iterator[StepReport], period: int) -> Timed:
    """One update of a trainer at a time; the newest selection tells what is not trained."""

    def update() -> float:
        report = next(reports)
        for event in report.events:
            if event["kind"] == "selection":
                timed.untrained = 1 - event["kept"] / event["candidates"]
        return report.seconds

    timed = Timed(update, period)
    return timed


def _plain_loop(precision: PrecisionName, rows: int, length: int) -> Callable[[], float]:
    """Forward, backward, step: the same model under torch's own AdamW, state in the weights' dtype."""
    model = _model(precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    stream = RandomRows(length)

    def update() -> float:
        taken = stream.take(rows).rows
        start = time.perf_counter()
        batch = batch_of(taken)
        loss, nll = model.loss(batch, scale=1.0 / batch.num_targets)
        loss.backward()
        float(nll)  # a loop that logs its loss reads it
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return update


def _print_table(precision: PrecisionName, timed: dict[str, Timed]) -> None:
    dense, frozen = timed["adamw"].best, timed["frozen"].best
    print(f"\n{precision}, {timed['adamw'].made - WARM_UP} rounds")
    print(
        f"{'variant':<16}{'ms':>8}{'median':>8}{'of adamw':>10}{'S':>8}{'bound':>8}{'saved':>8}"
        f"  {'met':<5}{'(2+(1-S))/3':>12}"
    )
    for name in ("plain loop", *VARIANTS):
        each = timed[name]
        line = f"{name:<16}{each.best * 1e3:>8.0f}{each.median * 1e3:>8.0f}{each.best / dense:>10.3f}"
        if each.untrained is not None:
            possible = each.untrained * (dense - frozen)
            bound = dense - LIMITS["bound"] * possible
            line += f"{each.untrained:>8.3f}{bound / dense:>8.3f}{(dense - each.best) / possible:>8.2f}"
            line += f"  {_verdict(each.best <= bound):<5}{(2 + (1 - each.untrained)) / 3:>12.3f}"
        print(line)
    plain = dense / timed["plain loop"].best
    print(f"adamw / plain loop: {plain:.3f} (at most {LIMITS['plain']}: {_verdict(plain <= LIMITS['plain'])})")


def _print_shares(timed: dict[str, Timed]) -> None:
    """What choosing costs at defaults: a probe by every turn of the default rule, a selection by patience."""
    base = timed[BASE].best
    every = _probe_every(BLOCKS)
    probe = (timed["probing"].best - base) / (PROBED - 1 / every)
    probing = probe / every / base
    selection = timed["selecting"].best - base
    selecting = selection / (PATIENCE + 1) / base
    scouting = timed[BASE].first_seconds - base
    total = probing + selecting
    print(f"a probe {probe * 1e3:.1f} ms, one in {every} update(s): {probing:.2%} of the time")
    print(f"a selection {selection * 1e3:.0f} ms, at most one in {PATIENCE + 1} updates: {selecting:.2%}")
    met = _verdict(total < LIMITS["choosing"])
    print(f"selecting and probing together {total:.2%} (below {LIMITS['choosing']:.0%}: {met})")
    print(f"the first update, which scouts and loads kernels, takes {scouting / base:.1f} updates more, once in a run")


def _verdict(is_met: bool) -> str:
    return "yes" if is_met else "NO"


if __name__ == "__main__":
    main()
