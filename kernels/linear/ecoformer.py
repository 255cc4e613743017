"""Attention by binary codes: EcoFormer (Liu et al. 2022, arXiv:2209.09004, section 4).

    h(x) = sign(A phi(x)) in {-1, +1}^b,  phi_a(x) = exp(-|x / |x| - anchor_a|^2 / (2 sigma)) - mu_a,  sign(0) = +1
    "paper":     out_i = sum_j (h_i . h_j + beta) v_j / sum_j (h_i . h_j + beta)    over the keys j that i sees
    "official":  out_i = (sum_j (h_i . h_j) v_j + beta v_i) / the same: what the published code computes, and its
                 checkpoints need; v_i is the value at the query's own position, aligned at the end, if it is seen

beta = b + 1 keeps every weight positive. Never exact: the hash is fitted, and the scale of the scores is lost with the
lengths of q and k. Where the paper shares one projection between them, those of a pretrained site differ: both are
hashed by the same function, one for each key head and its query heads. Anchors, A, mu and sigma are parameters; the
published code takes sigma anew from each batch, which would make the answer depend on later tokens.

h . h' + beta = [h, sqrt(beta)] . [h', sqrt(beta)], so this is linear attention with b + 1 features, causal or not,
summed in float32. Work is O(N (m d + m b + b d)), memory beyond the operands that of one chunk on a CPU, of the
codes on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.codegen.linear_formula import LinearFormula
from rewriter.codegen.linear_implementation import linear_attention
from rewriter.site import AttentionSite, Causal, Dense, Full, Padding, Refusal, SlidingWindow
from rewriter.target import Target
from rewriter.variant import Case, Config, Implementation, Variant

_EPS = 1e-6  # a visible key weighs at least 1
_BITS, _ANCHORS = 16, 25  # of the paper's models
_NEIGHBOURS, _TOKENS = 10, 256  # how many keys are similar to a query, and from how many tokens of a call it is learned


def signs(y: Tensor) -> Tensor:
    """-1 or +1, +1 at 0. The gradient goes straight through where |y| < 1, and is zero elsewhere."""
    hard = torch.where(y >= 0, 1.0, -1.0).to(y.dtype)
    if not y.requires_grad:
        return hard
    soft = torch.where(y.abs() < 1, y, 0.0)
    return hard + (soft - soft.detach())


def similar(scores: Tensor, seen: Tensor) -> Tensor:
    """+1 at the largest scores of each row, -1 at the smallest, of those that are seen; 0 elsewhere."""
    count, found = min(_NEIGHBOURS, scores.shape[-1]), torch.zeros_like(scores)
    for sign in (1.0, -1.0):
        places = (sign * scores).masked_fill(~seen, -math.inf).topk(count).indices
        found.scatter_add_(-1, places, torch.full_like(scores[..., :count], sign))  # where both, neither
    return found.masked_fill(~seen, 0.0)


def _spread(length: int, device: torch.device) -> Tensor:
    """Places over a whole sequence."""
    return torch.linspace(0, length - 1, min(length, _TOKENS), device=device).long()


def formula(site: AttentionSite, config: Config) -> LinearFormula:
    """The sum over codes: in the paper's form with one more feature, in the other it is not divided."""
    causal, paper = site.mask.positional == Causal(), config["bias_mode"] == "paper"
    return LinearFormula(normalised=paper, eps=_EPS, causal=causal, features=int(config["bits"]) + paper)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    site: AttentionSite,
    config: Config,
    module: EcoFormer,
) -> Tensor:
    """The definition with the whole matrix of weights: (B, H, Sq, Dv). A query that sees no key gives zeros."""
    groups, (q_len, kv_len), beta = (
        query.shape[1] // key.shape[1],
        (query.shape[2], key.shape[2]),
        int(config["bits"]) + 1,
    )
    seen = site.mask.visible(q_len, kv_len, query.device)[None, None]
    if padding is not None:
        seen = seen & padding[:, None, None, :]
    products = module.codes(query) @ module.codes(key).repeat_interleave(groups, 1).mT
    total = (products + beta).masked_fill(~seen, 0.0).sum(-1, keepdim=True)
    added: Tensor | float = beta
    if config["bias_mode"] == "official":
        own = torch.arange(q_len)[:, None] + kv_len - q_len == torch.arange(kv_len)
        added = beta * own.to(products)
    weights = (products + added).masked_fill(~seen, 0.0)
    return weights / (total + _EPS) @ value.repeat_interleave(groups, 1)


class EcoFormer(nn.Module):
    """An `Implementation` with one hash for each key head, in float32: anchors (Hkv, m, D), the centre mu (Hkv, m), the
    logarithm of sigma (Hkv,), and A, `directions` (Hkv, b, m).
    """

    def __init__(self, site: AttentionSite, config: Config) -> None:
        super().__init__()
        self.formula, self.paper = formula(site, config), config["bias_mode"] == "paper"
        self.beta, self.mask = int(config["bits"]) + 1, site.mask
        heads, anchors = site.kv_heads, int(config["anchors"])
        random = torch.Generator().manual_seed(0)
        points = F.normalize(torch.randn(heads, anchors, site.head_dim, generator=random), dim=-1)
        directions = torch.randn(heads, self.beta - 1, anchors, generator=random)
        # Points of a sphere in any direction are sqrt(2) apart: sigma and mu of such tokens.
        self.anchors = nn.Parameter(points.to(site.device))
        self.directions = nn.Parameter(directions.to(site.device))
        self.log_sigma = nn.Parameter(torch.full((heads,), math.log(2.0), device=site.device))
        self.centre = nn.Parameter(torch.full((heads, anchors), math.exp(-0.5), device=site.device))

    def distances(self, x: Tensor) -> Tensor:
        """|x / |x| - anchor|^2: (B, Hkv, n, D) -> float64 (B, Hkv, n, m)."""
        x, anchors = F.normalize(x.double(), dim=-1), self.anchors.double()
        return x.square().sum(-1, keepdim=True) + anchors.square().sum(-1)[:, None] - 2 * x @ anchors.mT

    def kernel(self, x: Tensor) -> Tensor:
        """exp(-|x / |x| - anchor|^2 / (2 sigma)), before it is centred: (B, Hkv, n, D) -> float64 (B, Hkv, n, m)."""
        return (-0.5 * self.distances(x) * (-self.log_sigma.double()).exp()[:, None, None]).exp()

    def codes(self, x: Tensor) -> Tensor:
        """h(x) of queries or keys, (B, heads, n, D) -> (B, heads, n, b).

        In float64, so that the sign of a number near 0 does not depend on the order of a sum: a token has the same code
        in a chunk, in a step of decoding and in the whole sequence.
        """
        grouped = x.unflatten(1, (self.anchors.shape[0], -1))
        phi = self.kernel(grouped.flatten(2, 3)) - self.centre.double()[:, None]
        codes: Tensor = signs(phi @ self.directions.double().mT).unflatten(2, grouped.shape[2:4])
        return codes.flatten(1, 2).to(x.dtype)

    @torch.no_grad()
    def start(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None) -> None:
        """The self-supervised hash of the paper's section 4.3, from the operands of a call, before any gradient.

        Anchors are tokens, sigma their mean squared distance. Wanted of h_i . h_j is b for the keys of the largest
        scores of a query, -b for those of the smallest. Bit by bit, a direction is the best for what is left of that
        if the sign is relaxed to a bounded length, which has a solution, as in kernel-based supervised hashing. Where
        the published code improves each bit by gradient descent, the fit that follows improves all together.
        """
        heads, bits, anchors = self.directions.shape
        rows, columns = (_spread(x.shape[2], x.device) for x in (query, key))
        seen = self.mask.visible(query.shape[2], key.shape[2], query.device)[rows][:, columns][None, None, None]
        real = key.new_ones(len(key), len(columns), dtype=torch.bool) if padding is None else padding[:, columns]
        q, k = query[:, :, rows].double().unflatten(1, (heads, -1)), key[:, :, columns].double()
        left = bits * similar(q @ k[:, :, None].mT, seen & real[:, None, None, None, :]).flatten(2, 3)
        q = q.flatten(2, 3)
        tokens = torch.cat([q.transpose(0, 1).flatten(1, 2), k.transpose(0, 1)[:, real]], 1)
        chosen = torch.randint(tokens.shape[1], (anchors,), generator=torch.Generator().manual_seed(0))
        self.anchors.copy_(F.normalize(tokens[:, chosen.to(tokens.device)], dim=-1))
        self.log_sigma.copy_(self.distances(tokens[None])[0].mean((1, 2)).clamp_min(_EPS).log())
        self.centre.copy_(self.kernel(tokens[None])[0].mean(1))
        phi_q, phi_k, all_phi = (self.kernel(x) - self.centre.double()[:, None] for x in (q, k, tokens[None]))
        square = (all_phi.mT @ all_phi)[0] / tokens.shape[1]
        root = torch.linalg.cholesky(square + _EPS * torch.eye(anchors, dtype=q.dtype, device=q.device))
        for bit in range(bits):
            agreement = (phi_q.mT @ left @ phi_k).sum(0)
            half = torch.linalg.solve_triangular(root, agreement + agreement.mT, upper=False)
            whitened = torch.linalg.solve_triangular(root, half.mT, upper=False)
            best = torch.linalg.eigh((whitened + whitened.mT) / 2).eigenvectors[..., -1:]
            # Half of unit variance: most numbers are below 1, where a gradient passes.
            direction = 0.5 * torch.linalg.solve_triangular(root.mT, best, upper=True)
            self.directions[:, bit] = direction[..., 0]
            left = left - signs(phi_q @ direction) @ signs(phi_k @ direction).mT

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """`mask` is not read: the site's mask is causal or full, and `padding`."""
        dtype = query.dtype
        query, key, value = (t.to(torch.promote_types(dtype, torch.float32)) for t in (query, key, value))
        sums = self._paper if self.paper else self._official
        return sums(query, key, value, padding).to(dtype)

    def _paper(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        def one_more(x: Tensor) -> Tensor:
            return F.pad(self.codes(x), (0, 1), value=math.sqrt(self.beta))

        maps = {"query_map": one_more, "key_map": one_more}
        return linear_attention(self.formula, query, key, value, 1.0, **maps, padding=padding)

    def _official(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        q_len, kv_len, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
        maps = {"query_map": self.codes, "key_map": self.codes}
        counted = F.pad(value, (0, 1), value=1.0)  # a value of ones gives the sum of the products
        sums = linear_attention(self.formula, query, key, counted, 1.0, **maps, padding=padding)
        real = value.new_ones(1, kv_len) if padding is None else padding.to(value.dtype)
        past = (0, 0, q_len - kv_len, 0)  # a negative one is cut off
        own = F.pad(value * real[:, None, :, None], past).repeat_interleave(groups, 1)
        if self.formula.causal:
            count = F.pad(real.cumsum(-1)[:, None, :, None], past)
        else:
            count = real.sum(-1)[:, None, None, None]
        return (sums[..., :-1] + self.beta * own) / (sums[..., -1:] + self.beta * count + _EPS)


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Causal or full attention, with or without padding, of any lengths."""
    reason = ""
    if site.dropout_p > 0:
        reason = f"dropout of {site.dropout_p} acts on attention weights, which sums over binary codes never form"
    elif site.mask.has(Dense):
        reason = (
            "the mask is a tensor of which nothing is known, and a sum over codes cannot leave any out for one query"
        )
    elif site.mask.positional not in (Full(), Causal()):
        reason = f"a running sum over codes can be causal or full, and the mask is {site.mask}"
    return Refusal(reason, site.path, site.source) if reason else True


def configs(site: AttentionSite, target: Target) -> Iterable[Config]:
    """The paper's form and sizes. The official one is for its checkpoints: its weights do not sum to one."""
    return ({"bits": _BITS, "anchors": _ANCHORS, "bias_mode": "paper"},)


def build(site: AttentionSite, config: Config) -> Implementation:
    """The module, its anchors and directions at random, the same every time."""
    return EcoFormer(site, config)


_SITE = AttentionSite(
    path="case", heads=6, kv_heads=2, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Causal(),
    batch=3, q_len=300, kv_len=300,
)  # fmt: skip
_OFFICIAL: Config = {"bits": _BITS, "anchors": _ANCHORS, "bias_mode": "official"}

VARIANT = Variant(
    name="ecoformer",
    paper="arXiv:2209.09004, section 4",
    fidelity="learned",
    reference=reference,
    applies=applies,
    configs=configs,
    build=build,
    formula=formula,
    cases=[
        Case(site=_SITE),
        Case(site=_SITE, configs=[_OFFICIAL]),
        Case(site=replace(_SITE, dtype="bfloat16")),
        Case(site=replace(_SITE, mask=Causal() & Padding(), v_head_dim=8)),
        Case(site=replace(_SITE, mask=Causal() & Padding(), v_head_dim=8), configs=[_OFFICIAL]),
        Case(site=replace(_SITE, mask=Full() & Padding())),
        Case(site=replace(_SITE, mask=Full() & Padding()), configs=[_OFFICIAL]),
        Case(site=replace(_SITE, mask=Full(), q_len=137), configs=[{**_OFFICIAL, "bias_mode": "paper", "bits": 5}]),
        Case(site=replace(_SITE, q_len=1)),
    ],
    near_misses=[
        replace(_SITE, dropout_p=0.1),
        replace(_SITE, mask=Dense()),
        replace(_SITE, mask=Causal() & SlidingWindow(20, 0)),
        replace(_SITE, mask=Causal(1)),
    ],
)
