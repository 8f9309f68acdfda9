"""The loss over the vocabulary in few passes: its values, and what it must not allocate."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.batch import CleanBatch
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.vocabulary import TokenSpace

ROWS, COLUMNS = 37, 128
VOCABULARY = 512
SPACE = TokenSpace(VOCABULARY, VOCABULARY, 0, 4, 5, (0, 1, 2, 3, 4))


@pytest.mark.parametrize("slice_", [COLUMNS, 5 * COLUMNS, 1 << 20])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_log_probability_equals_autograd_whatever_the_slice(topology, monkeypatch, slice_, scale):
    from pretrain.model import vocab_functions

    monkeypatch.setattr(vocab_functions, "_SLICE_ON_CPU", slice_)
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    logits[:, :5] = -torch.inf
    ids = torch.randint(5, COLUMNS, (ROWS, 3), generator=generator)
    upstream = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    before = ours.detach().clone()
    log_p = vocab_functions.LogProbability.apply(ours, ids, 0, topology.tp_group)
    expected = plain.log_softmax(dim=-1).gather(1, ids)
    torch.testing.assert_close(log_p, expected, rtol=1e-12, atol=1e-12)
    (log_p * upstream).sum().backward(retain_graph=True)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-14)
    assert torch.equal(ours.detach(), before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_p.sum().backward()


class Outputs(TorchDispatchMode):
    """Names of the operations that returned a new tensor of at least `elements`."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.names = elements, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = (x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor))
        given = {x.untyped_storage().data_ptr() for x in tensors}
        if isinstance(result, torch.Tensor) and result.numel() >= self.elements:
            name = str(function)
            if result.untyped_storage().data_ptr() not in given or "copy" in name:
                self.names.append(name.split(".")[1])
        return result


@pytest.mark.parametrize("name", ["autoregressive", "masked"])
def test_a_step_makes_no_needless_tensor_over_the_vocabulary(topology, name):
    """Logits, their exponentials; the gradient takes the place of the latter."""
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer
    from pretrain.module import ObjectiveModule

    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    model = Transformer(config, SPACE, topology)
    initialize(model, seed=0)
    objective = build_objective(objectives.make(name=name, time_window=8), SPACE)
    tokens = torch.randint(5, VOCABULARY, (8, 64))
    clean = CleanBatch(
        tokens=tokens,
        position=torch.arange(8),
        segment=torch.zeros_like(tokens, dtype=torch.int32),
        valid=torch.ones_like(tokens, dtype=torch.bool),
        all_valid=True,
    )
    batch = objective.corrupt(clean, NoiseKey(0, clean.position))
    module = ObjectiveModule(model, objective)
    with Outputs(len(batch.targets) * VOCABULARY) as outputs:
        module(batch).backward()
    assert outputs.names == ["mm", "empty_like"]
