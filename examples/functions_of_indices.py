"""A variant as two functions of indices: its reference, its C++ and its Triton kernels are generated from them.

Dilated attention (after arXiv:2004.05150, section 3): every second key nearby, with a penalty on the distance.
"""

from dataclasses import replace

import torch

import rewriter
from rewriter.codegen.formula import Formula, of_site
from rewriter.codegen.implementation import defined, generated
from rewriter.site import AttentionSite, Full, Refusal
from rewriter.target import Target
from rewriter.variant import Case, Config, Variant


def every_second(i, j, reach):  # type: ignore[no-untyped-def]
    """Which keys a query sees: i and j are their positions. Blocks of keys in which there are none are not visited."""
    return ((i - j).abs() < 2 * reach) & ((i - j) % 2 == 0)


def nearer(s, i, j, penalty):  # type: ignore[no-untyped-def]
    """What becomes of a score."""
    return s - penalty * (i - j).abs()


def formula(site: AttentionSite, config: Config) -> Formula:
    """The site's own mask and scores, and ours; the config's numbers go to the parameters of the same names."""
    own = of_site(site)
    return replace(
        own, masks=(*own.masks, every_second), scores=(*own.scores, nearer), numbers={**own.numbers, **config},  # type: ignore[dict-item]
    )  # fmt: skip


def applies(site: AttentionSite, target: Target) -> bool | Refusal:
    """Encoders, without dropout."""
    if site.mask.positional != Full() or site.dropout_p > 0:
        return Refusal(f"a dilated window is for a full mask without dropout, and this is {site}", site.path)
    return True


SITE = AttentionSite(
    path="case", heads=4, kv_heads=4, head_dim=16, v_head_dim=16, dtype="float32", scale=0.25, mask=Full(), batch=2,
    q_len=70, kv_len=70,
)  # fmt: skip

VARIANT = Variant(
    name="every_second",
    paper="arXiv:2004.05150, section 3",
    fidelity="approximate",
    reference=defined(formula),
    applies=applies,
    configs=lambda site, target: [{"reach": 32, "penalty": 0.01}],
    build=generated(formula),
    cases=[Case(site=SITE)],
    formula=formula,
)

if __name__ == "__main__":
    rewriter.register(VARIANT)
    q, k, v = (torch.randn(2, 4, 70, 16) for _ in range(3))
    config = {"reach": 8, "penalty": 0.01}
    with torch.no_grad():
        out = VARIANT.build(SITE, config)(q, k, v, None, None)
    torch.testing.assert_close(out, VARIANT.reference(q, k, v, None, None, SITE, config), rtol=1e-4, atol=1e-5)
    print("the generated kernel agrees with its definition")
