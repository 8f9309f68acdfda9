"""Pointwise term of every uniform and interpolating bound, in closed form.

For a token x, its noisy value z and the masses alpha and r of `pretrain.noise.process`:

    D  = KL(q_t(.|x) || q_t(.|x_theta)) + IS(q_t(z|x), q_t(z|x_theta))
    KL = alpha d_x + r (log(1 + rho) - S),     rho = alpha / r,   S = sum_v log(1 + rho x_theta[v])
    IS = e^(d_z) - d_z - 1                     (a/b - log(a/b) - 1 of the two probabilities)
    d_v = log q_t(v|x) - log q_t(v|x_theta)    (0 for <mask>, whose mass does not depend on x)

The batch carries the weights w that turn it into a bound. With pure uniform noise w D is the
integrand of Duo (arXiv 2506.10892, eq. 11), with pure masking w D = -log x_theta[x] / t. The
minimiser of its expectation is the leave-one-out predictive p(x^l | z^(-l)), not p(x^l | z).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pretrain.model.vocab import VocabChunk


def divergence(chunk: VocabChunk, targets: Tensor, extra: dict[str, Tensor]) -> Tensor:
    """Divergence D of each row, float64 [n].

    `extra` holds `noisy` (z), `noisy_is_mask`, `alpha` and `uniform` (r), each [n].

    The vocabulary is reduced in the precision of the logits, the rest is float64.
    """
    alpha, r = extra["alpha"], extra["uniform"]
    # Column 0 of all [n, 2] tensors below is the token x, column 1 its noisy value z.
    rho = torch.where(r > 0, alpha / r, 0.0)
    log_p, total = chunk.log1p_terms(torch.stack((targets, extra["noisy"]), dim=1), rho)
    log_q_theta = torch.logaddexp(alpha.log()[:, None] + log_p.double(), r.log()[:, None])
    same = targets == extra["noisy"]
    survived = torch.stack((torch.ones_like(same), same), dim=1)
    log_q = torch.log(alpha[:, None] * survived + r[:, None])
    d = log_q - log_q_theta
    # d_noisy is 0 for <mask>, and expm1(d) - d is the Itakura-Saito term.
    kl = alpha * d[:, 0] + r * (rho.log1p() - total.double())
    d_noisy = torch.where(extra["noisy_is_mask"], 0.0, d[:, 1])
    return kl + (d_noisy.expm1() - d_noisy)
