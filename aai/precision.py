"""Which arithmetic suits a device: `auto` is bfloat16 where the hardware multiplies it, float32 elsewhere.

A CPU without native bfloat16 emulates it and is many times slower than in float32.
"""

import os

import torch

CAPS_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""Values of ONEDNN_MAX_CPU_ISA, oneDNN's ceiling of instructions, that lie below AVX512_CORE_BF16."""


def native_bfloat16(device: str | torch.device) -> bool:
    """Whether `device` multiplies bfloat16 natively: a GPU since Ampere, an x86 CPU with AVX512_BF16 or AMX."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if cap.upper() in CAPS_WITHOUT_BFLOAT16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve(name: str, device: str | torch.device) -> str:
    """The name of the dtype that a setting stands for on `device`: float32, bfloat16 or float16."""
    if name != "auto":
        return name
    return "bfloat16" if native_bfloat16(device) else "float32"


def dtype_of(name: str, device: str | torch.device) -> torch.dtype:
    """The dtype that a setting (`auto` among them) stands for on `device`."""
    dtype: torch.dtype = getattr(torch, resolve(name, device))
    return dtype
