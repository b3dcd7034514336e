"""bfloat16 is used where the hardware multiplies it, float32 elsewhere."""

import pytest
import torch

from stages.models.precision import autocast, compute_dtype, multiplies_bfloat16, names_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize("instructions", ["amx_bf16", "avx512_bf16", "bf16", "sve_bf16"])
def test_one_instruction_set_is_enough(instructions: str):
    assert names_bfloat16({"avx2": True, instructions: True})
    assert not names_bfloat16({"avx2": True, instructions: False})


def test_avx512_alone_does_not_multiply_bfloat16():
    assert not names_bfloat16({"avx2": True, "avx512_f": True, "avx512_bw": True, "avx512_vnni": True})


def test_fp32_is_never_lowered():
    assert compute_dtype(CPU, "fp32") is torch.float32


def test_autocast_computes_in_the_dtype_that_is_announced():
    left, right = torch.full((4, 4), 1.001), torch.eye(4)
    with autocast(CPU, "bf16"):
        product = left @ right
    assert product.dtype is compute_dtype(CPU, "bf16")
    # 1.001 has no bfloat16: it rounds to 1.0, which float32 would not do
    assert bool((product == 1.0).all()) is multiplies_bfloat16("cpu")
