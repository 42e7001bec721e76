"""Kernels for GPUs, compiled without one: what their machine code takes."""

import json

import pytest

pytest.importorskip("triton", reason="triton is for Linux")

import compile_kernels


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def test_the_trellis_kernel_keeps_within_its_limits():
    case = compile_kernels.cases()[0]
    found = compile_kernels.compile_case(case, 90)
    assert found.fault is None and (found.target, found.local_bytes) == ("sm_90", 0)
    assert 15 < found.instructions_per_weight <= 30 and 16 <= found.registers <= 64
    assert found.shared_bytes == 4 * 4096  # the table in fp32


@pytest.mark.slow
def test_all_kernels_keep_within_their_limits_on_all_targets(tmp_path, capsys):
    compile_kernels.main(["--json", str(tmp_path / "kernels.json")])
    rows = json.loads((tmp_path / "kernels.json").read_text())
    assert len(rows) == 3 * len(compile_kernels.cases())
    assert {row["target"] for row in rows} == {"sm_80", "sm_89", "sm_90"}
    assert "| trellis, wide columns |" in capsys.readouterr().out


def test_what_a_kernel_may_not_take_is_named():
    fields = {"kernel": "trellis", "target": "sm_90", "registers": 60, "local_bytes": 0, "shared_bytes": 0}
    fault = compile_kernels.Compiled(**fields, instructions_per_weight=30.5).fault
    assert fault == "30.5 instructions per weight"
    fields |= {"local_bytes": 8}
    assert "8 bytes of local memory" in compile_kernels.Compiled(**fields, instructions_per_weight=20).fault
