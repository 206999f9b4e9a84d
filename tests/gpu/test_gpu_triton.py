"""The Triton kernel on a CUDA device, against torch's kernel on the CPU: the arithmetic is the same to the bit."""

import hashlib

import numpy as np
import pytest
import torch

from blockllm_cli.optim.adam import AdamRule
from blockllm_cli.optim.blocks import Piece
from blockllm_cli.optim.dense_state import DenseState
from blockllm_cli.optim.entries import Entries
from blockllm_cli.optim.kept_state import KeptState
from blockllm_cli.optim.precision import precision_of
from blockllm_cli.optim.triton_adam import why_no_triton
from support.interpreted import philox, rounded_by

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or why_no_triton(torch.device("cuda")) is not None,
        reason="needs a CUDA device, Triton and a C compiler",
    ),
]

RULE = AdamRule(weight_decay=0.1, decoupled=True)
SHAPE = (1024, 768)


def positions(count, seed):
    order = torch.randperm(SHAPE[0] * SHAPE[1], generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values


def pieces(device):
    """All forms, with counts that are multiples of 16: torch's scalar tail differs in the last bit."""
    return {
        "whole": (Piece("whole", SHAPE), Entries.all(SHAPE)),
        "norm": (Piece("norm", (80,)), Entries.all((80,))),
        "slice": (Piece("slice", (512, 768), (100, 612)), Entries.all((512, 768))),
        "list": (Piece("list", SHAPE), Entries.of(positions(8000, 1).to(device), SHAPE)),
        "bitmap": (Piece("bitmap", SHAPE), Entries.of(positions(400_000, 2).to(device), SHAPE)),
        "rows": (Piece("rows", SHAPE), Entries.of(torch.arange(0, 1024, 3, device=device), SHAPE, "row")),
    }


def drawn(seed, dtype):
    draw = torch.Generator().manual_seed(seed)
    names = ("whole", "slice", "list", "bitmap", "rows")
    shapes = {**dict.fromkeys(names, SHAPE), "norm": (80,)}
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def made(device, precision, rounding="nearest"):
    state = KeptState(RULE, precision_of(precision, rounding), 7)
    weights = {name: weight.to(device) for name, weight in drawn(1, state._precision.weights).items()}
    state.attach(weights)
    for piece, entries in pieces(device).values():
        state.start(piece, entries)
    return state, weights


def gradients(state, step):
    drawn_now = drawn(100 + step, state._precision.accumulator(1))
    return {
        record.key: record.entries.gather(
            record.piece.of(drawn_now[record.piece.parameter].to(state.weight(record.piece).device))
        ).clone()
        for record in state.records()
    }


def rate_of(name):
    return 1e-2 if name in ("whole", "list") else 3e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master", "bf16_papers"])
def test_updates_are_those_of_the_cpu_to_the_bit(precision):
    cpu, gpu = made("cpu", precision), made("cuda", precision)
    for step in (1, 2, 3):
        wanted = cpu[0].update(gradients(cpu[0], step), rate_of, step, count_unchanged=True)
        found = gpu[0].update(gradients(gpu[0], step), rate_of, step, count_unchanged=True)
        assert wanted is None or float(found) == pytest.approx(float(wanted), abs=1e-6)
    for name, weight in cpu[1].items():
        assert torch.equal(gpu[1][name].cpu(), weight), name
    held = {name: tensor for name, _, tensor in gpu[0].held()}
    for name, _, tensor in cpu[0].held():
        assert torch.equal(held[name].cpu(), tensor), name


def test_stochastic_rounding_draws_the_numbers_of_its_key():
    state, _ = made("cuda", "bf16_master", "stochastic")
    state.update(gradients(state, 5), rate_of, 5)
    for record in state.records():
        name = record.piece.parameter
        key = hashlib.blake2b(f"7/{name}".encode(), digest_size=8).digest()
        shape = (80,) if name == "norm" else SHAPE
        places = record.piece.of(torch.arange(torch.Size(shape).numel()).view(shape)).cuda()
        where = record.entries.gather(places).cpu()
        counter = np.zeros((4, where.numel()))
        counter[0], counter[2] = where, 5
        draws = philox(counter, (int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")), 7)
        stored = record.entries.gather(state.weight(record.piece)).cpu()
        assert torch.equal(stored, rounded_by(draws[0], record.master.cpu())), name


def test_the_host_does_not_wait_for_the_device():
    state, _ = made("cuda", "bf16")
    state.update(gradients(state, 1), rate_of, 1, count_unchanged=True)
    given = [gradients(state, step) for step in (2, 3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.update(given[0], rate_of, 2)
        state.update(given[1], rate_of, 3, count_unchanged=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_whole_pieces_are_the_dense_state_to_the_bit(precision):
    rounding = "nearest" if precision == "fp32" else "stochastic"
    state, mine = made("cuda", precision, rounding)
    dense = DenseState(RULE, precision_of(precision, rounding), 7)
    theirs = {name: drawn(1, state._precision.weights)[name].cuda() for name in ("whole", "norm")}
    dense.allocate(theirs)
    for step in (1, 2):
        state.update(gradients(state, step), rate_of, step)
        now = drawn(100 + step, state._precision.accumulator(1))
        dense.update({name: now[name].cuda() for name in theirs}, rate_of)
    assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())


def test_a_piece_beyond_the_reach_of_int32_is_updated_to_its_end():
    size = 2**31 + 2**10
    if torch.cuda.mem_get_info()[0] < 10 * size:
        pytest.skip("needs 20 GB")
    weight = {"w": torch.ones(size, dtype=torch.bfloat16, device="cuda")}
    state = KeptState(AdamRule(), precision_of("bf16_papers"), 0)
    state.attach(weight)
    state.start(Piece("w", (size,)), Entries.all((size,)))
    state.update({"w@1": torch.ones(size, dtype=torch.bfloat16, device="cuda")}, lambda _: 0.5, 1)
    assert float(weight["w"][-1]) == float(weight["w"][0]) == 0.5
    assert bool((weight["w"][-(2**11) :] == 0.5).all())
