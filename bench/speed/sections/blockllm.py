"""BlockLLM over its budget, between a dense update and one in which no matrix trains.

T_d is the update of adamw, T_0 that of frozen (embedding, head and norms train, which is what BlockLLM trains beside
its budget, norms of idle layers excepted), S the share of the candidates' entries that BlockLLM does not train. The
limit is T_d - 0.9 S (T_d - T_0): nine tenths of the time that these entries could save are saved; `saved` is the share
that was. Beside it stands (2 + (1 - S)) / 3, the share of the products of a dense update that is left if nothing but
products of weights took time and the head were free.

Figures are the fastest update of each, those that probe and those that do not weighted as they come. Selecting and
probing are measured enlarged, since they are below the noise as they are: a selection in every update, a quarter of all
blocks probed in every update.
"""

from __future__ import annotations

import statistics
from typing import Any

from speed.cases import OURS, Case, Contestant, Section
from speed.figures import Clock
from speed.markdown import joined, missing, table
from speed.models import shape_of
from speed.results import CaseResult, Outcome, SectionResult

SHAPE = shape_of("60m", vocab_size=4096)
LAYERS = SHAPE["num_hidden_layers"]
BLOCKS = 7 * LAYERS
ROWS, LENGTH = 4, 256
PATIENCE = 100
WARM_UP = 3  # updates; BlockLLM scouts and selects in its first
PROBED = BLOCKS // 4
LIMITS = {"saved": 0.9, "plain": 1.05, "choosing": 0.01}

VARIANTS: dict[str, dict[str, Any]] = {
    "tensor, s 0.5": {"sparsity": 0.5},
    "tensor, s 0.9": {"sparsity": 0.9},
    "tensor, s 0.95": {"sparsity": 0.95},
    "tensor, s 0.99": {"sparsity": 0.99},
    "4 of 8 layers": {"sparsity": 0.5, "granularity": "layer"},
    "2 of 8 layers": {"sparsity": 0.75, "granularity": "layer"},
    "1 of 8 layers": {"sparsity": 0.875, "granularity": "layer"},
}
BASE = "tensor, s 0.9"
ENLARGED: dict[str, dict[str, Any]] = {
    "selecting": {"sparsity": 0.9, "max_interval": 1},
    "probing": {"sparsity": 0.9, "probe": PROBED, "probe_every": 1},
}


def cases() -> list[Case]:
    """One for each precision; with --all also those of compiled layers."""
    return [_case(precision, is_compiled=compiled) for compiled in (False, True) for precision in ("fp32", "bf16")]


def _case(precision: str, *, is_compiled: bool = False) -> Case:
    spec = {"shape": SHAPE, "rows": ROWS, "length": LENGTH, "precision": precision, "compile": is_compiled}

    def contestant(label: str, worker: str, **more: Any) -> Contestant:
        return Contestant(label, OURS, worker, {**spec, **more}, precision, not is_compiled)

    def ours(label: str, method: str, options: dict[str, Any]) -> Contestant:
        return contestant(label, "ours", method=method, options=options)

    contestants = (
        contestant("plain loop", "ours_plain_loop"),
        ours("adamw", "adamw", {}),
        ours("frozen", "frozen", {}),
        # No selection comes by itself while this lasts, and the blocks of every update are those of the first.
        *(
            ours(label, "blockllm", {"patience": 1000 * PATIENCE, **options})
            for label, options in (VARIANTS | ENLARGED).items()
        ),
    )
    name = f"{precision}, compiled" if is_compiled else precision
    return Case(name, contestants, ROWS * LENGTH, "tokens", 2.0, WARM_UP, (5, 200))


def probe_every(label: str) -> int:
    """Updates from one that probes to the next by the default rule; 1 if all are alike."""
    if label not in VARIANTS:
        return 1
    blocks = LAYERS if VARIANTS[label].get("granularity") == "layer" else BLOCKS
    return -(-34 // blocks)


def fastest(outcome: Outcome, period: int, clock: Clock = "wall") -> float:
    """Seconds of an update, from the fastest that probes and the fastest that does not."""
    probing = [repeat[clock] for repeat in outcome.repeats if period > 1 and repeat["step"] % period == 0]
    steady = [repeat[clock] for repeat in outcome.repeats if period == 1 or repeat["step"] % period != 0]
    if not probing or not steady:
        return float(min(probing + steady))
    return float((min(probing) + (period - 1) * min(steady)) / period)


def untrained(outcome: Outcome) -> float | None:
    """The share of the candidates that is not trained, as the newest selection said it; None if there was none."""
    share = outcome.repeats[-1].get("untrained")
    return None if share is None else float(share)


def page(result: SectionResult, clock: Clock = "wall") -> str:
    """A table for each precision, and what choosing costs."""
    return joined(*(_page_of(name, case, clock) for name, case in result.cases.items()))


def _page_of(precision: str, case: CaseResult, clock: Clock) -> str:
    seconds = {
        label: fastest(outcome, probe_every(label), clock)
        for label, outcome in case.outcomes.items()
        if outcome.state == "measured" and outcome.repeats
    }
    if not {"adamw", "frozen"} <= seconds.keys():
        return joined(*missing(case))
    dense, frozen = seconds["adamw"], seconds["frozen"]
    rows = []
    for label in ("plain loop", "adamw", "frozen", *VARIANTS):
        if label not in seconds:
            continue
        outcome = case.outcomes[label]
        median = statistics.median(repeat[clock] for repeat in outcome.repeats)
        share = untrained(outcome)
        cells = [label, f"{seconds[label] * 1e3:.0f}", f"{median * 1e3:.0f}", f"{seconds[label] / dense:.3f}"]
        rows.append(cells + (_against_limit(seconds[label], share, dense, frozen) if share is not None else [""] * 5))
    rounds = len(case.outcomes["adamw"].repeats)
    heads = [f"{precision}, {rounds} rounds", "fastest ms", "median ms", "of adamw"]
    return joined(
        table([*heads, "S", "limit", "saved", "met", "(2+(1-S))/3"], rows),
        _plain(seconds),
        _choosing(seconds),
        *missing(case),
    )


def _against_limit(seconds: float, share: float, dense: float, frozen: float) -> list[str]:
    possible = share * (dense - frozen)
    limit = dense - LIMITS["saved"] * possible
    met = _verdict(seconds <= limit)
    saved = (dense - seconds) / possible
    return [f"{share:.3f}", f"{limit / dense:.3f}", f"{saved:.2f}", met, f"{(2 + (1 - share)) / 3:.3f}"]


def _plain(seconds: dict[str, float]) -> str:
    if "plain loop" not in seconds:
        return ""
    ratio = seconds["adamw"] / seconds["plain loop"]
    return (
        f"adamw takes {ratio:.3f} of a plain loop with torch's AdamW on the same model "
        f"(at most {LIMITS['plain']}: {_verdict(ratio <= LIMITS['plain'])})."
    )


def _choosing(seconds: dict[str, float]) -> str:
    """What choosing costs at defaults: a probe by every turn of the default rule, a selection by patience."""
    if not {BASE, *ENLARGED} <= seconds.keys():
        return ""
    base, every = seconds[BASE], probe_every(BASE)
    probe = (seconds["probing"] - base) / (PROBED - 1 / every)
    probing = probe / every / base
    selection = seconds["selecting"] - base
    selecting = selection / PATIENCE / base
    together = max(0.0, probing) + max(0.0, selecting)  # noise below nothing makes up for nothing
    met = _verdict(together < LIMITS["choosing"])
    return (
        f"A probe takes {probe * 1e3:.1f} ms, one in {every} update(s): {probing:.2%} of the time. A selection takes "
        f"{selection * 1e3:.0f} ms, at most one in {PATIENCE} updates: {selecting:.2%}. Together "
        f"{together:.2%} (below {LIMITS['choosing']:.0%}: {met})."
    )


def _verdict(is_met: bool) -> str:
    return "yes" if is_met else "NO"


SECTION = Section("blockllm", "BlockLLM over s, between adamw and frozen", page, cases)
