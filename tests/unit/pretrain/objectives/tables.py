"""Small languages and explicit predictions, fed to the objectives' own functions in float64."""

import numpy as np
import torch

from pretrain.batch import CleanBatch
from pretrain.config.objectives import objectives
from pretrain.noise.time import spread_time
from pretrain.objectives import build_objective
from pretrain.objectives.interpolating import bound_weight
from pretrain.vocabulary import TokenSpace

MASK, FIRST = 1, 2


def space(k):
    """k possible targets with ids 2, 3, ... (the first is <doc>); 0 is pad and 1 <mask>."""
    return TokenSpace(FIRST + k, FIRST + k, 0, 1, FIRST, (0, 1))


def family(name, k, window=64, **fields):
    return build_objective(objectives.make(name=name, time_window=window, **fields), space(k))


def noised(name, k, **fields):
    """The uniform objective, or an interpolating one of the given noise."""
    if name == "duo":
        return family("uniform", k, **fields)
    return family("interpolating", k, noise=name, **fields)


def clean_batch(x):
    """CleanBatch of symbols x [n, L] (0-based)."""
    tokens = torch.as_tensor(x, dtype=torch.int64) + FIRST
    return CleanBatch(
        tokens=tokens,
        position=torch.arange(len(tokens)),
        segment=torch.zeros_like(tokens, dtype=torch.int32),
        valid=torch.ones_like(tokens, dtype=torch.bool),
        all_valid=True,
    )


class Chunk:
    """Head outputs given as probabilities of the k symbols, float64 [n, k]."""

    def __init__(self, probability):
        p = torch.as_tensor(probability, dtype=torch.float64)
        self.p = torch.cat((torch.zeros(len(p), FIRST, dtype=torch.float64), p), dim=1)

    def cross_entropy(self, ids):
        return -self.p.gather(1, ids[:, None])[:, 0].log()

    def log1p_terms(self, ids, rho):
        return self.p.gather(1, ids).log(), torch.log1p(rho[:, None] * self.p).sum(dim=1)


def terms(objective, process, t, x, z, prediction):
    """Weighted bound terms [n, L] for symbols x, z [n, L] (z = -1 is <mask>), prediction [n, L, k]
    and one t, through the objective's own assembly; 0 where the head is not evaluated."""
    x, z = np.asarray(x), np.asarray(z)
    clean = clean_batch(x)
    noisy = torch.as_tensor(np.where(z < 0, 1, z + FIRST))
    marginal = process.marginal(torch.full((len(x), 1), float(t), dtype=torch.float64))
    weight = bound_weight(clean, noisy, marginal, objective)
    batch = objective.assemble(clean, noisy, marginal, weight)
    prediction = np.asarray(prediction).reshape(x.size, -1)
    rows = torch.arange(x.size) if batch.rows is None else batch.rows
    loss = objective.token_bound(Chunk(prediction[rows.numpy()]), batch.targets, batch.extra)
    out = torch.zeros(x.size, dtype=torch.float64)
    out[rows] = loss * batch.weight
    return out.reshape(x.shape).numpy()


def kernel(process, t):
    """q_t(z | x) as a matrix [k symbols, k + 1 values of z]; the last column is <mask>."""
    k = process.num_targets
    alpha, r, m = (float(v) for v in process.masses(torch.tensor(float(t), dtype=torch.float64)))
    return np.concatenate((alpha * np.eye(k) + r, np.full((k, 1), m)), axis=1)


def quadrature(process, n):
    """(t, weight) pairs that integrate over (0, 1) by way of `spread_time`."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    u = torch.as_tensor((nodes + 1) / 2)
    t, jacobian = spread_time(u, process.spread)
    return zip(t.tolist(), (jacobian.numpy() * weights / 2).tolist(), strict=True)


def all_sequences(values, length):
    """Every sequence [n, length] of the given values."""
    grids = np.meshgrid(*[values] * length, indexing="ij")
    return np.stack([g.reshape(-1) for g in grids], axis=1)


def exact_bound(objective, process, x, predict, n=200):
    """E_t E_z sum_l of the bound of one sequence x [L], by quadrature and enumeration.

    predict(z [m, L], kernel) -> [m, L, k].
    """
    x = np.asarray(x)
    k = process.num_targets
    total = 0.0
    for t, weight in quadrature(process, n):
        q = kernel(process, t)
        values = np.concatenate(([-1], np.arange(k))) if q[0, -1] > 0 else np.arange(k)
        z = all_sequences(values, len(x))
        probability = np.prod([q[x[l], z[:, l]] for l in range(len(x))], axis=0)
        z, probability = z[probability > 0], probability[probability > 0]
        xs = np.broadcast_to(x, z.shape)
        each = terms(objective, process, t, xs, z, predict(z, q)).sum(axis=1)
        total += weight * float(probability @ each)
    return total


def leave_one_out(joint, z, q):
    """p(x^l | z^(-l)) for a joint over two symbols [k, k]: [m, 2, k]."""
    first = q[:, z[:, 1]]  # likelihood of z^2 given x^2: [k, m]
    second = q[:, z[:, 0]]
    out = np.stack((joint @ first, joint.T @ second), axis=0).transpose(2, 0, 1)
    return out / out.sum(axis=2, keepdims=True)


def posterior(joint, z, q):
    """p(x^l | z) for the same language: the leave-one-out predictive times the token's own word."""
    out = leave_one_out(joint, z, q) * np.stack((q[:, z[:, 0]].T, q[:, z[:, 1]].T), axis=1)
    return out / out.sum(axis=2, keepdims=True)


def entropy(p):
    return -float((p * np.log(p)).sum())
