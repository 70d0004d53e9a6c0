import pytest
import torch

from aai import precision


@pytest.fixture
def new_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bfloat16 natively, whatever this one does."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


@pytest.mark.usefixtures("new_cpu")
@pytest.mark.parametrize(
    ("cap", "expected"),
    [
        (None, "bfloat16"),
        ("DEFAULT", "bfloat16"),
        ("AVX512_CORE_BF16", "bfloat16"),
        ("AVX512_CORE_AMX", "bfloat16"),
        ("AVX2", "float32"),
        ("avx2_vnni", "float32"),
        ("AVX512_CORE", "float32"),
    ],
)
def test_auto_heeds_the_ceiling_of_instructions(
    cap: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cap:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    assert precision.resolve("auto", "cpu") == expected
    assert precision.dtype_of("auto", "cpu") == getattr(torch, expected)


def test_auto_is_float32_where_bfloat16_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert precision.resolve("auto", torch.device("cpu")) == "float32"


@pytest.mark.usefixtures("new_cpu")
def test_an_explicit_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert [precision.resolve(name, "cpu") for name in ("float32", "bfloat16", "float16")] == [
        "float32",
        "bfloat16",
        "float16",
    ]
