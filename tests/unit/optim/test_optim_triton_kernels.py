"""What the compiler makes of the kernel; it needs no device for that."""

import re

import pytest
import torch

from support.interpreted import needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(torch.version.hip is not None, reason="asks the compiler for CUDA")]

TABLES = dict.fromkeys(("records", "gradients"), "*i64") | dict.fromkeys(("scalars", "constants"), "*fp32")
TABLES |= dict.fromkeys(("owners", "ranks", "changed"), "*i32") | {"draw": "i32"}


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """PTX of the kernel for a card, from a form and dtypes of weights and moments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from blockllm_cli.optim import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def made(capability, form, weight, moment="float32", *, master=False, rounding="nearest", aligned=True):
        language = triton_kernels.tl
        options = {
            "BLOCK": 1024,
            "FORM": form,
            "WEIGHT": getattr(language, weight),
            "GRADIENT": getattr(language, weight),
            "MOMENT": getattr(language, moment),
            "MASTER": master,
            "FROM_MOMENT": True,
            "DECAY": "decoupled",
            "STOCHASTIC": rounding == "stochastic",
            "COUNT": weight == "bfloat16" and not master,
            "ALIGNED": aligned,
        }
        signature = TABLES | dict.fromkeys(options, "constexpr")
        source = ASTSource(fn=triton_kernels.update_entries, signature=signature, constexprs=options)
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options={"num_warps": 4, "enable_fp_fusion": False}).asm["ptx"]

    return made


@pytest.mark.parametrize("form", ["all", "list", "rows", "bitmap"])
def test_it_compiles_for_every_form_with_exact_arithmetic(compiled, form):
    ptx = compiled(80, form, "bfloat16", "bfloat16", rounding="stochastic")
    assert set(re.findall(r"(?:div|sqrt)\.[a-z]+\.f32", ptx)) == {"div.rn.f32", "sqrt.rn.f32"}
    # Two for each entry, and none that the compiler made of a product and a sum.
    products, fused = ptx.count("mul.rn.f32") + ptx.count("mul.f32"), ptx.count("fma.rn.f32")
    assert fused > 0
    assert products == 2 * fused


@pytest.mark.parametrize(("weight", "master", "loads", "stores"), [("float32", False, 8, 6), ("bfloat16", True, 7, 7)])
def test_full_tiles_of_whole_pieces_move_in_16_bytes(compiled, weight, master, loads, stores):
    ptx = compiled(90, "all", weight, master=master)
    assert ptx.count("ld.global.v4.b32") == loads
    assert ptx.count("st.global.v4.b32") == stores
    assert "v4.b32" not in compiled(90, "all", weight, master=master, aligned=False)
