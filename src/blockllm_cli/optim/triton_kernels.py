"""The Triton kernel of Adam over kept entries. The one module that imports Triton: import it inside functions only.

One program updates one tile of one record: a run of `BLOCK` kept entries, or, where a bitmap says which they are, of
`BLOCK` positions. It gathers the weights, computes in fp32, rounds once, and scatters. With g, w, m, v the gradient,
weight and moments of an entry and t its number of updates:

    w = w * (1 - rate * decay)                          decoupled decay (AdamW), or
    g = fma(w, decay, g)                                decay with L2 (Adam)
    m = fma(1 - beta1, g - m, m)                        beta1 <= 1/2: fma(-beta1, g - m, g)
    v = fma((1 - beta2) * g, g, v * beta2)
    w = w + -rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Every operation is the IEEE one (no contraction beyond the fma that stand here, roots and quotients correctly rounded),
so results do not depend on the device, on tiles or on how entries are named. They are those of the vector part of
torch's fused kernel for CPUs to the bit.

Tables: `records` int64 (records, COLUMNS) with addresses of weight, two moments, master copy and index, then first
tile, size (kept entries; positions with a bitmap), entries of a row, key of the draws, and the number of the record's
first position in its parameter. `gradients` int64: address of each record's gradient. `scalars` fp32 (records, 3):
-rate / (1 - beta1^t), sqrt(1 - beta2^t), 1 - rate * decay. `constants` fp32: 1 - beta1 (-beta1 if beta1 <= 1/2), beta2,
1 - beta2, eps, decay. `owners` int32: the record of each tile. `ranks` int32: kept entries of the record before each
tile, for bitmaps. `changed` int32: weights of each tile whose bf16 value changed, written if `COUNT`.
"""

import triton
import triton.language as tl

COLUMNS = tl.constexpr(10)
ROUNDS = tl.constexpr(7)  # of Philox: as few as pass BigCrush (Salmon et al. 2011, table 2)


@triton.jit
def philox(low, high, draw, key, ROUNDS: tl.constexpr):
    """Philox 4x32 of counter (low, high, draw, 0) under the 64 bits of `key`; four uint32 (Salmon et al. 2011).

    Written out because what Triton brings is bound, when Triton is first imported, to its compiler or its interpreter.
    """
    c0 = low.to(tl.uint32)
    c1 = high.to(tl.uint32)
    c2 = c0 * 0 + draw.to(tl.uint32)
    c3 = c0 * 0
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        wide0 = c0.to(tl.uint64) * 0xD2511F53
        wide2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (wide2 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (wide0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = wide2.to(tl.uint32)
        c3 = wide0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def plus(left, right):
    """The sum, for scans and reductions."""
    return left + right


@triton.jit
def pointer_of(table, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address that stands at `table`; `ALIGNED` promises a multiple of 16 bytes, which wide loads need."""
    pointer = tl.load(table).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def read(pointer, inside, MASKED: tl.constexpr):
    """Load as fp32."""
    value = tl.load(pointer, mask=inside, other=0.0) if MASKED else tl.load(pointer)
    return value.to(tl.float32)


@triton.jit
def rounded(value, bits, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """fp32 as `TYPE`: to nearest even, or to either neighbour with the lower 16 of the random `bits`.

    bf16 is the upper half of fp32: something below 2**16 is added and the lower half cut off. A random number carries
    with probability (lower half) / 2**16; half a unit, less one bit where the upper half is even, is nearest even.
    Infinities are kept, NaN stays NaN. By hand, since the interpreter's own conversion cuts off.
    """
    if TYPE.is_bf16():
        raw = value.to(tl.uint32, bitcast=True)
        is_finite = (raw & 0x7F800000) != 0x7F800000
        added = (bits & 0xFFFF) if STOCHASTIC else 0x7FFF + ((raw >> 16) & 1)
        kept = tl.where(value == value, raw, 0x7FC00000)
        value = (tl.where(is_finite, raw + added, kept) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value


@triton.jit
def write(pointer, value, inside, MASKED: tl.constexpr):
    """Store."""
    if MASKED:
        tl.store(pointer, value, mask=inside)
    else:
        tl.store(pointer, value)


@triton.jit
def step(w, g, m, v, scalars, constants, FROM_MOMENT: tl.constexpr, DECAY: tl.constexpr):
    """The formula of the module, on fp32."""
    if DECAY == "decoupled":
        w = w * tl.load(scalars + 2)
    elif DECAY == "l2":
        g = tl.fma(w, tl.load(constants + 4), g)
    m = tl.fma(tl.load(constants), g - m, m if FROM_MOMENT else g)
    v = tl.fma(tl.load(constants + 2) * g, g, v * tl.load(constants + 1))
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.load(scalars + 1)) + tl.load(constants + 3)
    return w + tl.div_rn(tl.load(scalars) * m, denominator), m, v


@triton.jit
def update_tile(
    record,
    gradient,
    scalars,
    constants,
    changed,
    draw,
    base,
    lanes,
    weight_base,
    weight_lanes,
    inside,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    MASTER: tl.constexpr,
    FROM_MOMENT: tl.constexpr,
    DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COUNT: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Gather, update and scatter the entries at `base + lanes` of the state, `weight_base + weight_lanes` of the piece.

    `record`, `gradient` and `scalars` are this record's places in the tables, `changed` is this tile's.
    """
    weight = pointer_of(record, WEIGHT, ALIGNED) + weight_base + weight_lanes
    exp_avg = pointer_of(record + 1, MOMENT, ALIGNED) + base + lanes
    exp_avg_sq = pointer_of(record + 2, MOMENT, ALIGNED) + base + lanes
    master = pointer_of(record + 3, tl.float32, ALIGNED) + base + lanes
    old = read(master if MASTER else weight, inside, MASKED)
    g = read(pointer_of(gradient, GRADIENT, ALIGNED) + base + lanes, inside, MASKED)
    m = read(exp_avg, inside, MASKED)
    v = read(exp_avg_sq, inside, MASKED)
    new, m, v = step(old, g, m, v, scalars, constants, FROM_MOMENT, DECAY)
    bits = lanes.to(tl.uint32)
    bits_m = bits
    bits_v = bits
    if STOCHASTIC:
        position = tl.load(record + 9) + weight_base + weight_lanes
        bits, bits_m, bits_v, _ = philox(position, position >> 32, draw, tl.load(record + 8), ROUNDS)
    if MASTER:
        write(master, new, inside, MASKED)
    stored = rounded(new, bits, WEIGHT, STOCHASTIC)
    write(weight, stored, inside, MASKED)
    write(exp_avg, rounded(m, bits_m, MOMENT, STOCHASTIC), inside, MASKED)
    write(exp_avg_sq, rounded(v, bits_v, MOMENT, STOCHASTIC), inside, MASKED)
    if COUNT:
        # A bf16 weight in fp32 has zeros in its lower half: the upper halves are the stored bits.
        differs = stored.to(tl.uint16, bitcast=True) != (old.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
        tl.store(changed, tl.reduce((differs & inside).to(tl.int32), 0, plus))


@triton.jit(do_not_specialize=["draw"])
def update_entries(
    records,
    gradients,
    scalars,
    constants,
    owners,
    ranks,
    changed,
    draw,
    BLOCK: tl.constexpr,
    FORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    MASTER: tl.constexpr,
    FROM_MOMENT: tl.constexpr,
    DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COUNT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile of a record whose entries are named in the way of `FORM`: "all", "list", "rows" or "bitmap"."""
    tile = tl.program_id(0)
    owner = tl.load(owners + tile)
    record = records + owner * COLUMNS
    gradient = gradients + owner
    rates = scalars + owner * 3
    first = (tile - tl.load(record + 5)) * BLOCK
    left = tl.load(record + 6) - first
    lanes = tl.arange(0, BLOCK)
    inside = lanes < left
    base = first
    state_lanes = lanes
    weight_base = first
    weight_lanes = lanes
    if FORM == "list":
        weight_base = first * 0
        weight_lanes = tl.load(pointer_of(record + 4, tl.int32, ALIGNED) + first + lanes, mask=inside, other=0)
    elif FORM == "rows":
        width = tl.load(record + 7)
        rows = pointer_of(record + 4, tl.int32, False) + first // width
        within = (first % width).to(tl.int32) + lanes
        row = tl.load(rows + within // width.to(tl.int32), mask=inside, other=0)
        weight_base = first * 0
        weight_lanes = row.to(tl.int64) * width + within % width.to(tl.int32)
    elif FORM == "bitmap":
        bitmap = pointer_of(record + 4, tl.uint8, ALIGNED) + first // 8
        byte = tl.load(bitmap + lanes // 8, mask=inside, other=0).to(tl.int32)
        bit = (byte >> (lanes % 8)) & 1
        inside = bit != 0
        base = tl.load(ranks + tile).to(tl.int64)
        state_lanes = tl.associative_scan(bit, 0, plus) - bit
    # A full tile goes without a mask, which would forbid wide loads.
    if FORM != "bitmap" and left >= BLOCK:
        update_tile(
            record, gradient, rates, constants, changed + tile, draw, base, state_lanes, weight_base, weight_lanes,
            inside, WEIGHT, GRADIENT, MOMENT, MASTER, FROM_MOMENT, DECAY, STOCHASTIC, COUNT, ALIGNED, False,
        )  # fmt: skip
    else:
        update_tile(
            record, gradient, rates, constants, changed + tile, draw, base, state_lanes, weight_base, weight_lanes,
            inside, WEIGHT, GRADIENT, MOMENT, MASTER, FROM_MOMENT, DECAY, STOCHASTIC, COUNT, ALIGNED, True,
        )  # fmt: skip
