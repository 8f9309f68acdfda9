"""The loss in chunks against the loss in one piece: values, gradients, and what exists at once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from small import BATCH, FAMILIES, LENGTH, SPACE, build, clean_batch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.noise.key import NoiseKey


def step(module, scale=0.37):
    """Loss and gradients, scaled as the engine scales them."""
    clean = clean_batch()
    batch = module.objective.corrupt(clean, NoiseKey(5, clean.position))
    dtype = module.model.embedding.weight.dtype
    if dtype == torch.float64:
        # Losses of some families are float32 whatever the model; their sum need not be, and a
        # power of two does not round.
        batch, scale = replace(batch, weight=batch.weight.double()), 0.5
    loss = module(batch)
    (loss * scale).backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in module.named_parameters()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_one_piece(topology, family, tied):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        made = [
            step(build(topology, FAMILIES[family], dtype, chunk, tie_embeddings=tied))
            for chunk in (0, 7, 1)
        ]
        for other in made[1:]:
            for name, want in made[0].items():
                error = (other[name] - want).norm() / want.norm()
                assert error <= tolerance, (dtype, name, float(error))


@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_in_chunks_equal_those_in_one_piece(topology, family):
    clean = clean_batch()
    bounds = []
    for chunk in (0, 5):
        module = build(topology, FAMILIES[family], loss_chunk=chunk)
        batch = module.objective.bound_batch(clean, NoiseKey(5, clean.position))
        with torch.no_grad():
            bounds.append(module(batch, exact=True))
    assert bounds[0].dtype == bounds[1].dtype == torch.float64
    torch.testing.assert_close(bounds[1], bounds[0], rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """Most rows of any tensor as wide as the vocabulary, that is not the weight."""

    def __init__(self, weight_shape):
        super().__init__()
        self.weight_shape, self.rows = weight_shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            wide = (
                isinstance(x, torch.Tensor)
                and x.dim() >= 2
                and x.shape[-1] == SPACE.padded_vocab_size
            )
            if wide and x.shape != self.weight_shape[::-1]:
                self.rows = max(self.rows, x.numel() // x.shape[-1])
        return out


@pytest.mark.parametrize("family", ["autoregressive", "uniform"])
@pytest.mark.parametrize("exact", [False, True], ids=["loss", "bound"])
def test_no_tensor_of_all_rows_and_the_vocabulary_ever_exists(topology, family, exact):
    clean = clean_batch()
    for chunk, most in ((0, BATCH * LENGTH), (6, 6)):
        module = build(topology, FAMILIES[family], loss_chunk=chunk)
        batch = module.objective.corrupt(clean, NoiseKey(5, clean.position))
        with Largest(module.model.embedding.weight.shape) as largest:
            if exact:
                with torch.no_grad():
                    module(batch, exact=True)
            else:
                module(batch).backward()
        assert largest.rows == most


def test_a_row_and_the_weight_are_kept_as_one_gradient_each(topology):
    from pretrain.model.chunked import total

    def terms(chunk, part):
        return chunk.cross_entropy(torch.full((part.stop - part.start,), 7))

    kept = {}
    for rows in (12, 24):
        module = build(topology, FAMILIES["autoregressive"], loss_chunk=4)
        hidden = torch.randn(rows, 16, requires_grad=True)
        storages = {}

        def pack(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = module.model.score(hidden, partial(total, terms=terms, chunk=4))
        kept[rows] = sum(x.untyped_storage().nbytes() for x in storages.values())
        assert loss.requires_grad
    assert kept[24] - kept[12] == 12 * 16 * 4
    assert kept[12] == 12 * 16 * 4 + 128 * 16 * 4


def test_half_precision_gradients_lose_nothing_to_the_number_of_chunks(topology):
    """Sixteen chunks are as close to float64 as one piece, which sums inside a matrix product."""
    want, piece, chunks = (
        step(build(topology, FAMILIES["autoregressive"], dtype, chunk, tie_embeddings=False))[
            "model.head.projection.weight"
        ].double()
        for dtype, chunk in ((torch.float64, 0), (torch.bfloat16, 0), (torch.bfloat16, 5))
    )
    assert (chunks - want).norm() <= 1.2 * (piece - want).norm()


@pytest.mark.parametrize("n", [1, 5, 4096, 100_003])
@pytest.mark.parametrize("v", [128, 50_304])
def test_chunks_cover_all_rows_once_in_nearly_equal_parts_of_bounded_size(n, v):
    from pretrain.model.chunked import CHUNK_BYTES, WHOLE_BYTES, slices

    rows, weight = torch.empty(n, 1, device="meta"), torch.empty(v, 1, device="meta")
    gpu = slices(rows, weight, None)  # a device that is no CPU
    cpu = slices(_OnCPU(n), weight, None)
    assert slices(rows, weight, 0) == [slice(0, n)]
    for parts in (gpu, cpu, slices(rows, weight, 3) if n < 5000 else gpu):
        assert [i for p in parts for i in (p.start, p.stop)][1:-1] == [
            i for p in parts[1:] for i in (p.start, p.start)
        ]
        assert parts[0].start == 0 and parts[-1].stop == n
        sizes = [p.stop - p.start for p in parts]
        assert min(sizes) > 0 and len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
    assert max(p.stop - p.start for p in gpu) * v * 4 <= max(CHUNK_BYTES, v * 4)
    assert (len(cpu) == 1) == (n * v * 4 <= WHOLE_BYTES)


class _OnCPU:
    """Stands in for rows on a CPU, without their memory."""

    def __init__(self, n):
        self.shape, self.device = (n, 1), torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_without_rows_has_a_loss_of_zero_and_gradients_of_zero(
    topology, family, monkeypatch
):
    """Context parallelism shares out rows; one masked token leaves the second rank without any."""
    from pretrain import module

    monkeypatch.setattr(module, "local_targets", lambda values, topology: values[:0])
    for chunk in (None, 0, 7):
        made = step(build(topology, FAMILIES[family], loss_chunk=chunk))
        assert made.pop("loss") == 0
        assert all(gradient is None or not gradient.any() for gradient in made.values())
        assert made["model.embedding.weight"] is not None
