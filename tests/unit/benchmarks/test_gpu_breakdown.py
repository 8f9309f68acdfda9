"""Kernels by class, what of the profiler's events is a kernel, and counted operations."""

from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType


@pytest.fixture
def breakdown(importable):
    from gpu_day import breakdown

    return breakdown


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
def test_kernels_are_classed_by_name(breakdown, name, kind):
    assert breakdown.kernel_class(name) == kind


def test_shares_add_to_one_largest_first(breakdown):
    times = [("gemm a", 3.0), ("gemm b", 3.0), ("Memset", 2.0), ("x", 0.0)]
    found = breakdown.kernel_shares([breakdown.Kernel(*pair, 1) for pair in times])
    assert found == {"matrix product": 0.75, "copy": 0.25}
    assert list(found) == ["matrix product", "copy"]
    assert breakdown.kernel_shares([]) == {}


def test_a_kernel_counts_once_on_cuda(breakdown):
    """Not again in the operation that started it, nor in a named range around it."""

    def event(key, device, annotation=False):
        return SimpleNamespace(
            key=key, self_device_time_total=5.0, self_cpu_time_total=7.0, count=2,
            device_type=device, is_user_annotation=annotation,
        )  # fmt: skip

    events = [
        event("aten::mm", DeviceType.CPU),
        event("nvjet_tnn", DeviceType.CUDA),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, annotation=True),
    ]
    assert breakdown.kernels_of(events, cuda=True) == [("nvjet_tnn", 5.0, 2)]
    assert [k.microseconds for k in breakdown.kernels_of(events[:1], cuda=False)] == [7.0]


def test_operations_follow_from_the_matrices_and_the_rows_that_are_evaluated(importable):
    from gpu_day.steps import counted_flops
    from synthetic import configuration, token_space

    from pretrain.config.run import ModelConfig
    from pretrain.objectives import build_objective

    model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=2, ffn_hidden_size=96)
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    for name, readable in (("autoregressive", (32 + 1) / 2), ("masked", 32)):
        settings = configuration("model=tiny", f"objective={name}").objective
        objective = build_objective(settings, token_space(128))
        found = counted_flops(model, 128, 32, objective, head_share=0.25)
        expected = 6 * matrices + 6 * 64 * 128 * 0.25 + 3 * 4 * 2 * 64 * readable
        assert found == pytest.approx(expected)
