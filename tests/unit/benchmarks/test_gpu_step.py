"""What benchmarks/gpu_step.py computes without a GPU, and the whole of it on a tiny shape."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def gpu_step(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_step

    return gpu_step


def run(*arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_step.py"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopB_TNN", "matrix product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_nt_n", "matrix product"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "matrix product"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "collective"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("void cuComputeGradInput_rms_norm<float, float>", "norm, softmax, sum"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor<float>>", "elementwise"),
        ("triton_poi_fused_add_mul_silu_0", "elementwise"),
        ("void at::native::indexSelectLargeIndex<c10::BFloat16>", "gather, scatter"),
        ("something_else", "other"),
    ],
)
def test_kernels_are_classed_by_name(gpu_step, name, kind):
    assert gpu_step.kernel_class(name) == kind


def test_shares_add_to_one_largest_first(gpu_step):
    found = gpu_step.kernel_shares([("gemm a", 3.0), ("gemm b", 3.0), ("Memset", 2.0), ("x", 0.0)])
    assert found == {"matrix product": 0.75, "copy": 0.25}
    assert list(found) == ["matrix product", "copy"]
    assert gpu_step.kernel_shares([]) == {}


def test_operations_follow_from_the_matrices_and_the_rows_that_are_evaluated(gpu_step):
    from pretrain.config.objectives import objectives
    from pretrain.config.run import ModelConfig
    from pretrain.objectives import build_objective
    from pretrain.vocabulary import TokenSpace

    model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=2, ffn_hidden_size=96)
    space = TokenSpace(128, 128, 0, 4, 5, (0, 1, 2, 3, 4))
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    for name, readable in (("autoregressive", (32 + 1) / 2), ("masked", 32)):
        objective = build_objective(objectives.make(name=name, time_window=4), space)
        found = gpu_step.counted_flops(model, 128, 32, objective, head_share=0.25)
        expected = 6 * matrices + 6 * 64 * 128 * 0.25 + 3 * 4 * 2 * 64 * readable
        assert found == pytest.approx(expected)


def test_the_table_names_hardware_commit_and_denominators(gpu_step):
    setting = gpu_step.Setting(8, "selective", "on", "off")
    row = gpu_step.Row("1.7b", "masked", setting, 1.0, 50_000.0, 1e10, 3 << 30, {"copy": 1.0})
    arguments = Namespace(length=2048, vocabulary=32768, dry_run=False)
    text = gpu_step.table([row], 625e12, arguments, "NVIDIA H200")
    assert "NVIDIA H200" in text and f"commit {gpu_step.commit()}" in text
    assert "989 TFLOP/s dense" in text and "625.0 TFLOP/s" in text
    # 5e4 tokens/s of 1e10 operations are 500 TFLOP/s.
    expected = "| 1.7b | masked | 8 | selective | on | off | 50,000 | 50.6% | 80.0% | 3.0 |"
    assert expected in text.splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_can_be_done():
    result = run()
    assert result.returncode == 3
    assert "needs an NVIDIA GPU" in result.stderr and "--dry-run" in result.stderr


@pytest.mark.slow
def test_the_dry_run_goes_from_end_to_end(tmp_path):
    found = tmp_path / "rows.json"
    result = run("--dry-run", "--json", str(found))
    assert result.returncode == 0, result.stderr
    assert "dry run: figures mean nothing" in result.stdout
    rows = json.loads(found.read_text())["rows"]
    assert [row["objective"] for row in rows] == ["autoregressive", "masked", "uniform"]
    for row in rows:
        assert row["kernels"]["matrix product"] > 0
        assert sum(row["kernels"].values()) == pytest.approx(1.0)
