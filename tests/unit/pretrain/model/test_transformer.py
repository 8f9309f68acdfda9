"""The transformer against a reference written from the formulas, and its attention rules."""

import math

import pytest
import torch

from pretrain.batch import AttentionRule, CleanBatch
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.vocabulary import TokenSpace

SPACE = TokenSpace(50, 128, 0, 4, 5, (0, 1, 2, 3, 4))


def build(topology, **changes):
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer

    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "init_std": 0.2}
    model = Transformer(ModelConfig(**{**shape, **changes}), SPACE, topology)
    initialize(model, seed=3)
    return model


def reference(model, ids, readable):
    """Logits [b, s, v] in float64 from the model's weights, one head and position at a time."""
    c = model.config
    p = {k: v.detach().double() for k, v in model.named_parameters()}
    d, m = c.head_size, c.num_attention_heads // c.query_groups

    def norm(x, w):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.norm_eps) * w

    def rope(x, l):
        half = d // 2
        angle = l * c.rope_base ** (-torch.arange(half, dtype=torch.float64) * 2 / d)
        a, b = x[:half], x[half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))

    logits = []
    for row, row_readable in zip(ids, readable, strict=True):
        x = p["embedding.weight"][row]
        s = len(row)
        for i in range(c.num_layers):
            w = {k.removeprefix(f"layers.{i}."): v for k, v in p.items() if f"layers.{i}." in k}
            h = norm(x, w["attention_norm.weight"]) @ w["attention.qkv.weight"].T
            h = h.view(s, c.query_groups, m + 2, d)
            heads = []
            for g in range(c.query_groups):
                keys = [h[l, g, m] for l in range(s)]
                if c.qk_norm:
                    keys = [norm(k, w["attention.k_norm.weight"]) for k in keys]
                keys = torch.stack([rope(k, l) for l, k in enumerate(keys)])
                for j in range(m):
                    out = []
                    for l in range(s):
                        q = h[l, g, j]
                        if c.qk_norm:
                            q = norm(q, w["attention.q_norm.weight"])
                        score = keys @ rope(q, l) / math.sqrt(d)
                        score[~row_readable[l]] = -math.inf
                        out.append(score.softmax(0) @ h[:, g, m + 1])
                    heads.append(torch.stack(out))
            x = x + torch.cat(heads, dim=-1) @ w["attention.out.weight"].T
            h = norm(x, w["mlp_norm.weight"]) @ w["mlp.up.weight"].T
            if c.activation == "swiglu":
                gate, up = h[:, 0::2], h[:, 1::2]
                h = gate * torch.sigmoid(gate) * up
            elif c.activation == "squared_relu":
                h = h.clamp(min=0) ** 2
            else:
                h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            x = x + h @ w["mlp.down.weight"].T
        x = norm(x, p["head.norm.weight"])
        head = p["embedding.weight"] if c.tie_embeddings else p["head.projection.weight"]
        logits.append(x @ head.T)
    return torch.stack(logits)


SHAPES = [
    {},
    {"num_query_groups": 2, "qk_norm": True, "tie_embeddings": False},
    {"num_query_groups": 1, "activation": "squared_relu"},
    {"activation": "gelu", "num_layers": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "columns"])
def test_logits_equal_the_reference(topology, shape, kind):
    model = build(topology, **shape)
    ids = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    readable = torch.ones(2, 7, 7, dtype=torch.bool)
    rule = AttentionRule(kind)
    if kind == "causal":
        readable = readable.tril()
    elif kind == "columns":
        segment = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0] * 7])
        group = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1, 1]])
        read = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1, 1]])
        rule = AttentionRule.from_columns(segment, group, read, read)
        for b in range(2):
            for q in range(7):
                for k in range(7):
                    readable[b, q, k] = segment[b, q] == segment[b, k] and (
                        group[b, q] == group[b, k] or read[b, k] < read[b, q]
                    )
    hidden = model(ids, torch.arange(7)[None], rule)
    chunk = model.vocabulary(hidden.transpose(0, 1).flatten(0, 1))
    expected = reference(model, ids, readable).flatten(0, 1)
    allowed = [v for v in range(50) if v not in SPACE.never_targets]
    torch.testing.assert_close(
        chunk.logits[:, allowed].double(), expected[:, allowed], rtol=2e-5, atol=2e-5
    )
    log_z = expected[:, allowed].logsumexp(-1)
    torch.testing.assert_close(chunk.log_sum_exp().double(), log_z, rtol=1e-5, atol=1e-5)
    target = torch.tensor(allowed)[torch.arange(14) % len(allowed)]
    log_p = expected.gather(1, target[:, None])[:, 0] - log_z
    torch.testing.assert_close(chunk.log_prob_at(target).double(), log_p, rtol=1e-5, atol=2e-5)
    one = chunk.sum_over_vocabulary(lambda p: p)
    torch.testing.assert_close(one, torch.ones_like(one))


def test_a_fresh_conditioned_model_ignores_the_level_and_learns_to_use_it(topology):
    model = build(topology, time_conditioning=True)
    ids, rule = torch.randint(5, 50, (2, 7)), AttentionRule("bidirectional")
    levels = [torch.tensor([0.1, 0.2]), torch.tensor([2.0, 5.0])]

    def output(level):
        return model(ids, torch.arange(7)[None], rule, level)

    assert torch.equal(output(levels[0]), output(levels[1]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name:
                parameter.add_(0.1)
    assert not torch.allclose(output(levels[0]), output(levels[1]))


def test_initial_weights_depend_on_seed_name_and_element_only(topology):
    from pretrain.model.initialize import initialize, keyed_normal

    deep, shallow = build(topology, num_layers=3), build(topology, num_layers=2)
    weights = dict(shallow.named_parameters())
    for name, parameter in deep.named_parameters():
        if name in weights and ".out." not in name and ".down." not in name:
            assert torch.equal(parameter, weights[name]), name
    # A shard is a slice of the whole, along either dimension.
    whole = keyed_normal(3, "w", range(10), slice(None), 9)
    assert torch.equal(keyed_normal(3, "w", range(5, 10), slice(None), 9), whole[5:])
    assert torch.equal(keyed_normal(3, "w", range(10), slice(3, 9), 9), whole[:, 3:])
    before = shallow.embedding.weight.clone()
    initialize(shallow, seed=4)
    assert not torch.allclose(before, shallow.embedding.weight)
    assert abs(float(before.detach().std()) / 0.2 - 1) < 0.05


def test_excluded_ids_have_probability_zero_and_no_gradient(topology):
    model = build(topology, tie_embeddings=False)
    hidden = torch.randn(3, 32)
    chunk = model.vocabulary(hidden)
    excluded = SPACE.excluded_columns
    assert torch.isneginf(chunk.logits[:, excluded]).all()
    chunk.cross_entropy(torch.tensor([5, 6, 7])).sum().backward()
    gradient = model.head.projection.weight.grad
    assert gradient[excluded].abs().max() == 0
    assert gradient[7].abs().max() > 0
    assert not gradient.isnan().any()


@pytest.mark.parametrize(
    ("name", "alone"), [("autoregressive", "causal"), ("masked", "bidirectional")]
)
def test_a_document_kept_apart_is_read_as_if_it_were_alone(topology, name, alone):
    """Input, positions and hidden states, whatever stands beside it in the row."""
    model = build(topology)
    g = torch.Generator().manual_seed(2)
    lengths = [4, 1, 6, 2]
    clean = CleanBatch(
        tokens=torch.randint(6, 50, (2, 13), generator=g),
        position=torch.arange(2),
        segment=torch.arange(4).repeat_interleave(torch.tensor(lengths)).expand(2, 13),
        valid=torch.ones(2, 13, dtype=torch.bool),
        all_valid=True,
        one_segment=False,
    )
    objective = build_objective(objectives.make(name=name, time_window=2), SPACE)
    batch = objective.corrupt(clean, NoiseKey(1, clean.position))
    start = 0
    with torch.no_grad():
        together = model(batch.ids, batch.positions, batch.attention)
        for length in lengths:
            part = slice(start, start + length)
            ids, places = batch.ids[:, part], torch.arange(length)[None]
            hidden = model(ids, places, AttentionRule(alone))
            torch.testing.assert_close(together[part], hidden, rtol=1e-5, atol=1e-6)
            if name == "autoregressive":
                shifted = torch.cat((torch.full((2, 1), 5), clean.tokens[:, part][:, :-1]), dim=1)
                assert torch.equal(ids, shifted)
            start += length
