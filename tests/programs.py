"""Attention programs, put together at random from the elements of the grammar, and what only looks like them.

`rewritten` captures a function without dynamo, in some tens of milliseconds, so that hundreds of them can be tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from rewriter.capture import Graph
from rewriter.detect import Detection, detect
from rewriter.guard import error, tolerance
from rewriter.passes import Rewrite
from rewriter.passes import rewritten as with_variants
from rewriter.raising import Match
from rewriter.retrace import REPLACED
from rewriter.site import Causal, Full, Mask
from rewriter.target import Target
from rewriter.variant import variants

# --- capture, rewrite, compare ---------------------------------------------------------------------------------------


def captured(model: Callable[..., Any], *inputs: Tensor) -> Graph:
    """The pre-dispatch graph of a module or a function; the first placeholders are the module's state."""
    state = dict(model.state_dict(keep_vars=True)) if isinstance(model, nn.Module) else {}
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)

    def run(*tensors: Tensor) -> Any:
        held, given = dict(zip(state, tensors, strict=False)), tensors[len(state) :]
        return functional_call(model, held, given) if isinstance(model, nn.Module) else model(*given)

    flat = [*state.values(), *inputs]
    with mode, torch.fx.traceback.preserve_node_meta():
        graph = make_fx(run, pre_dispatch=True, decomposition_table=REPLACED, _allow_non_fake_inputs=True)(
            *map(mode.from_tensor, flat)
        )
    graph.graph.eliminate_dead_code()
    for node, example in zip(graph.graph.find_nodes(op="placeholder"), flat, strict=True):
        node.meta["is_parameter"] = isinstance(example, nn.Parameter)
        if any(example is held and not isinstance(held, nn.Parameter) for held in state.values()):
            node.meta |= {"is_buffer": True, "buffer": example}
    return graph


def rewritten(
    model: Callable[..., Any], *inputs: Tensor, variant: str = "original"
) -> tuple[Detection, Callable[..., Any]]:
    """What is found, and a function of the inputs with each match replaced by the variant where that applies."""
    work = Rewrite(captured(model, *inputs), {})
    work.detection = detect(work.graph)

    def chosen(match: Match) -> Any:
        applies = variants()[variant].takes(match.site, Target.current())
        return variants()[variant if applies else "original"].build(match.site, {})

    graph = with_variants(work, chosen) or work.graph
    state = list(model.state_dict(keep_vars=True).values()) if isinstance(model, nn.Module) else []
    return work.detection, lambda *given: graph(*state, *given)


def check_equal(actual: Any, expected: Any, inputs: tuple[Tensor, ...] = ()) -> None:
    """Outputs within the tolerance of their type, and the gradients of those inputs that have one."""
    pairs = list(zip(tree_leaves(actual), tree_leaves(expected), strict=True))
    for got, wanted in pairs:
        assert got.dtype == wanted.dtype
        assert error(got, wanted) <= tolerance(wanted.dtype), "outputs"
        assert not (got.isnan() & ~wanted.isnan()).any(), "no NaN that was not there"
    sources = [t for t in inputs if t.requires_grad]
    if not sources:
        return
    directions = [torch.randn_like(wanted) for _, wanted in pairs]
    found, known = (
        torch.autograd.grad(list(out), sources, directions, allow_unused=True, materialize_grads=True)
        for out in zip(*pairs, strict=True)
    )
    for got, wanted in zip(found, known, strict=True):
        # A gradient is one more sum, and that of a learned number is one over everything.
        assert error(got, wanted) <= 10 * tolerance(wanted.dtype), "gradients"


# --- programs --------------------------------------------------------------------------------------------------------

NUMBERS = (0.125, 0.3, 1 / 3, 2.0)
MASKS = ("tril", "arange", "triu", "window", "prefix", "chunks", "padding", "documents", "random")
FILLS = ("masked_fill -inf", "masked_fill -1e9", "masked_fill lowest", "where", "add", "commuted add", "add of 1 - m")
BIASES = ("alibi", "table", "dense", "decomposed")
NORMALISERS = (
    "softmax", "torch.softmax", "float32", "decomposed", "exp and sum", "log_softmax", "logsumexp", "minus maximum",
    "safe", "nan_to_num", "plus one", "zero column", "learned column", "sigmoid", "relu",
)  # fmt: skip
EDITS = ("talking heads before", "talking heads after", "weights scaled", "renormalised", "weights returned")


@dataclass(frozen=True)
class Program:
    """One spelling of attention, as its elements. Sizes are those of the module's inputs."""

    layout: str = "packed"
    product: str = "matmul"
    value_product: str = "matmul"
    sharing: str = "none"
    batch: int = 2
    kv_heads: int = 2
    groups: int = 1
    q_len: int = 7
    kv_len: int = 7
    width: int = 16
    v_width: int = 16
    scales: tuple[tuple[str, str, float], ...] = ()
    softcap: float | None = None
    biases: tuple[str, ...] = ()
    masks: tuple[tuple[str, str], ...] = ()
    normaliser: str = "softmax"
    dropout: bool = False
    edit: str | None = None
    output: str = "as it is"
    dtype: str = "float32"
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    def module(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return ProgramModule(self).to(getattr(torch, self.dtype)).eval()

    def inputs(self) -> tuple[Tensor, ...]:
        """Queries, keys and values in the layout of the program, then visible tokens and a random mask."""
        torch.manual_seed(self.seed + 1)
        b, kv = self.batch, (self.kv_len, self.kv_heads)
        q = torch.randn(b, self.q_len, self.heads, self.width)
        k, v = torch.randn(b, *kv, self.width), torch.randn(b, *kv, self.v_width)
        tokens = torch.rand(b, self.kv_len) > 0.3
        tokens[:, 0] = True
        mask = torch.rand(b, 1, self.q_len, self.kv_len) > 0.4
        mask[..., 0] = True
        sides = [t.to(getattr(torch, self.dtype)) for t in (q, k, v)]
        if self.layout == "heads first":
            sides = [t.transpose(1, 2).contiguous() for t in sides]
        elif self.layout == "sequence first":
            sides = [t.transpose(0, 1).flatten(2) for t in sides]
        elif self.layout == "packed":
            sides = [torch.cat([t.flatten(2) for t in sides], -1)] * 3
        elif self.layout == "frames":
            sides = [torch.stack([t, t.roll(1, -1)], 1) for t in sides]
        return (*sides, tokens, mask)

    def site_facts(self) -> dict[str, Any]:
        """The facts of the site that are certain, by name."""
        facts: dict[str, Any] = {
            "head_dim": self.width,
            "v_head_dim": self.v_width,
            "softcap": self.softcap,
            "normaliser": self.normaliser if self.normaliser in ("sigmoid", "relu") else "softmax",
            "sink": {"plus one": "zero", "zero column": "zero", "learned column": "learned"}.get(self.normaliser),
            "dropout_p": 0.0,
        }
        # A number held by a tensor has the precision of the tensor.
        inexact = {"learned"} if self.dtype == "float32" else {"learned", "tensor"}
        # What is picked by an index is not followed further up.
        behind = self.sharing == "index" and any(place == "keys" for place, *_ in self.scales)
        if not behind and not inexact & {spelling for _, spelling, _ in self.scales}:
            facts["scale"] = math.prod(number for *_, number in self.scales)
        # Of a single query, multiplied and summed, nothing says which of the axes is that of the queries.
        one = self.q_len == 1 and self.product == "multiply and sum" and self.sharing in ("grouped", "broadcast")
        if self.layout not in ("frames", "folded") and not one:
            facts["heads"] = self.heads
            if self.sharing != "index":
                facts["kv_heads"] = self.kv_heads
        if self.edit is None and facts["normaliser"] == "softmax" and facts["sink"] is None:
            # The canonical operator adds above the softcap.
            facts["edits"] = ("bias_below_softcap",) if self.softcap is not None and self.biases else ()
        return facts

    def mask_is_right(self, mask: Mask) -> bool:
        """Can the mask of the site be that of the program? Where several elements meet, little is certain."""
        kinds = {kind for kind, _ in self.masks}
        if not kinds and not self.biases:
            return mask == Full()
        if self.q_len == 1:
            return True
        if not kinds & POSITIONAL:
            return not mask.has(Causal)
        if len(self.masks) == 1 and kinds <= CAUSAL and not self.biases and "add" not in self.masks[0][1]:
            return mask == Causal()
        return mask != Full()


CAUSAL = {"tril", "arange", "triu"}
POSITIONAL = CAUSAL | {"window", "prefix", "chunks"}


class ProgramModule(nn.Module):
    """A program that runs."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = p = program
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.table = nn.Parameter(torch.randn(p.q_len + p.kv_len, p.heads))
        self.places = nn.Parameter(torch.randn(p.kv_len, p.width) * 0.1)
        self.bias = nn.Parameter(torch.randn(1, p.heads, p.q_len, p.kv_len))
        self.sink = nn.Parameter(torch.randn(p.heads))
        self.mixing = nn.Parameter(torch.randn(p.heads, p.heads))
        self.gates = nn.Parameter(torch.randn(p.heads))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, p.heads + 1).float(), persistent=True)
        self.register_buffer("seen", torch.ones(p.q_len, p.kv_len, dtype=torch.bool).tril(p.kv_len - p.q_len))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, mask: Tensor) -> Any:
        p = self.program
        q, k, v = self.heads_first(q, k, v)
        q = self.scaled("queries", q)
        k = self.scaled("keys", k)
        q, k, v = self.shared(q, k, v)
        raw = q
        if p.layout == "folded":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        scores = self.scores(q, k)
        if p.layout == "folded":
            scores = scores.unflatten(0, (p.batch, p.heads))
        scores = self.scaled("scores", scores)
        for kind in p.biases:
            scores = scores + self.fitted(self.added(kind, raw, scores.dtype))
        if p.softcap is not None:
            scores = (scores / p.softcap).tanh() * p.softcap
        if p.edit == "talking heads before":
            scores = torch.einsum("hg,bgij->bhij", self.mixing, scores)
        for kind, fill in p.masks:
            scores = hidden(scores, self.fitted(self.visible(kind, tokens, mask)), fill)
        weights = self.weights(scores).to(v.dtype)
        if p.edit == "talking heads after":
            weights = torch.einsum("hg,bgij->bhij", self.mixing, weights)
        elif p.edit == "weights scaled":
            weights = weights * self.gates[:, None, None]
        elif p.edit == "renormalised":
            weights = weights * mask
            weights = weights / weights.sum(-1, keepdim=True)
        if p.dropout:
            weights = F.dropout(weights, 0.1, self.training)
        out = self.mixed(weights.flatten(0, 1) if p.layout == "folded" else weights, v)
        out = self.laid_out(out)
        return (out, weights) if p.edit == "weights returned" else out

    def heads_first(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        p = self.program
        if p.layout == "sequence first":
            return tuple(
                t.view(t.shape[0], p.batch, heads, -1).permute(1, 2, 0, 3)
                for t, heads in zip((q, k, v), (p.heads, p.kv_heads, p.kv_heads), strict=True)
            )
        if p.layout == "packed":
            sizes = [p.heads * p.width, p.kv_heads * p.width, p.kv_heads * p.v_width]
            parts = zip(q.split(sizes, -1), (p.heads, p.kv_heads, p.kv_heads), strict=True)
            return tuple(t.unflatten(-1, (heads, -1)).transpose(1, 2) for t, heads in parts)
        if p.layout in ("heads second", "folded", "frames"):
            return q.transpose(-2, -3), k.transpose(-2, -3), v.transpose(-2, -3)
        return q, k, v

    def scaled(self, place: str, value: Tensor) -> Tensor:
        for where, spelling, number in self.program.scales:
            if where == place:
                if spelling == "times":
                    value = value * number
                elif spelling == "divided":
                    value = value / (1 / number)
                elif spelling == "tensor":
                    value = value * torch.full([], number, dtype=value.dtype)
                else:
                    value = value * self.temperature
        return value

    def shared(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = self.program
        if p.sharing == "repeat_interleave":
            k, v = (t.repeat_interleave(p.groups, dim=-3) for t in (k, v))
        elif p.sharing == "repeat_kv":
            k, v = (t[:, :, None].expand(-1, -1, p.groups, -1, -1).flatten(1, 2) for t in (k, v))
        elif p.sharing == "index":
            index = torch.arange(p.heads) // p.groups
            k, v = k[:, index], v[:, index]
        elif p.sharing == "expand":
            k, v = (t.expand(-1, p.heads, -1, -1) for t in (k, v))
        elif p.sharing == "grouped":
            q, k, v = q.unflatten(1, (p.kv_heads, p.groups)), k[:, :, None], v[:, :, None]
        return q, k, v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        match self.program.product:
            case "matmul":
                return torch.matmul(q, k.transpose(-1, -2))
            case "@ mT":
                return q @ k.mT
            case "einsum":
                return torch.einsum("...id,...jd->...ij", q, k)
            case "einsum with heads":
                return torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2))
            case "multiply and sum":
                return (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)
            case "keys first":
                return (k @ q.mT).mT
            case "bmm":
                return torch.bmm(q, k.transpose(1, 2))
            case "baddbmm":
                return torch.baddbmm(q.new_zeros(q.shape[0], q.shape[1], k.shape[1]), q, k.mT, beta=1, alpha=1)
        raise AssertionError(self.program.product)

    def added(self, kind: str, q: Tensor, dtype: torch.dtype) -> Tensor:
        """A bias of shape (B or 1, H, Sq, Skv)."""
        p = self.program
        ages = torch.arange(p.q_len)[:, None] + (p.kv_len - p.q_len) - torch.arange(p.kv_len)
        if kind == "alibi":
            return (-self.slopes[:, None, None] * ages.abs())[None].to(dtype)
        if kind == "table":
            return self.table[ages + p.q_len - 1].permute(2, 0, 1)[None]
        if kind == "decomposed":
            return torch.einsum("bhid,jd->bhij", q, self.places)
        return self.bias

    def visible(self, kind: str, tokens: Tensor, mask: Tensor) -> Tensor:
        """bool of shape (Sq, Skv) or (B, 1, Sq or 1, Skv)."""
        p = self.program
        i, j = torch.arange(p.q_len)[:, None] + (p.kv_len - p.q_len), torch.arange(p.kv_len)
        match kind:
            case "tril":
                return self.seen
            case "arange":
                return j <= i
            case "triu":
                return ~torch.ones(p.q_len, p.kv_len, dtype=torch.bool).triu(p.kv_len - p.q_len + 1)
            case "window":
                return (j <= i) & (j > i - 3)
            case "prefix":
                return (j <= i) | (j < 2)
            case "chunks":
                return (j <= i) & (j // 3 == i // 3)
            case "padding":
                return tokens[:, None, None, :]
            case "documents":
                ids = tokens.cumsum(-1)
                return ids[:, None, -p.q_len :, None] == ids[:, None, None, :]
        return mask

    def fitted(self, term: Tensor) -> Tensor:
        """A term of four axes made to broadcast to the scores of this program."""
        if term.dim() == 2:
            return term
        if self.program.layout == "frames":
            return term.unsqueeze(1)
        if self.program.sharing == "grouped":
            shared = term.shape[1] == 1
            return term.unsqueeze(2) if shared else term.unflatten(1, (self.program.kv_heads, self.program.groups))
        return term

    def weights(self, scores: Tensor) -> Tensor:
        match self.program.normaliser:
            case "softmax":
                return scores.softmax(-1)
            case "torch.softmax":
                return torch.softmax(scores, dim=scores.dim() - 1)
            case "float32":
                return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
            case "decomposed":
                weights = (scores - scores.amax(-1, keepdim=True)).exp()
                return weights / weights.sum(-1, keepdim=True)
            case "exp and sum":
                return scores.exp() / scores.exp().sum(-1, keepdim=True)
            case "log_softmax":
                return scores.log_softmax(-1).exp()
            case "logsumexp":
                return (scores - scores.logsumexp(-1, keepdim=True)).exp()
            case "minus maximum":
                return (scores - scores.max(-1, keepdim=True).values).softmax(-1)
            case "safe":
                empty = (scores == float("-inf")).all(-1, keepdim=True)
                return torch.where(empty, 0.0, scores.softmax(-1))
            case "nan_to_num":
                return scores.softmax(-1).nan_to_num(0.0)
            case "plus one":
                return scores.exp() / (1 + scores.exp().sum(-1, keepdim=True))
            case "zero column":
                return F.pad(scores, (1, 0)).softmax(-1)[..., 1:]
            case "learned column":
                column = self.sink[:, None, None].expand(*scores.shape[:-1], 1)
                return torch.cat([scores, column], -1).softmax(-1)[..., :-1]
            case "sigmoid":
                return scores.sigmoid()
            case "relu":
                return scores.relu() / scores.shape[-1]
        raise AssertionError(self.program.normaliser)

    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        match self.program.value_product:
            case "matmul":
                return weights @ v
            case "einsum":
                return torch.einsum("...ij,...jd->...id", weights, v)
            case "multiply and sum":
                return (weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)
            case "values first":
                return (v.mT @ weights.mT).mT
            case "bmm":
                return torch.bmm(weights, v)
        raise AssertionError(self.program.value_product)

    def laid_out(self, out: Tensor) -> Tensor:
        p = self.program
        out = out.unflatten(0, (p.batch, p.heads)) if p.layout == "folded" else out
        out = out.flatten(1, 2) if p.sharing == "grouped" else out
        if p.output == "flatten":
            return out.transpose(-2, -3).flatten(-2)
        if p.output == "contiguous view":
            return out.transpose(-2, -3).contiguous().view(*out.shape[:-3], p.q_len, -1)
        return out


def hidden(scores: Tensor, seen: Tensor, fill: str) -> Tensor:
    """The scores with what is not seen hidden, in one of many spellings."""
    lowest = torch.finfo(scores.dtype).min
    match fill:
        case "masked_fill -inf":
            return scores.masked_fill(~seen, float("-inf"))
        case "masked_fill -1e9":
            return scores.masked_fill(seen.logical_not(), -1e9)
        case "masked_fill lowest":
            return scores.masked_fill(seen == 0, lowest)
        case "where":
            return torch.where(seen, scores, torch.full([], lowest, dtype=scores.dtype))
        case "add":
            return scores + torch.zeros_like(seen, dtype=scores.dtype).masked_fill(~seen, float("-inf"))
        case "commuted add":
            return torch.where(seen, 0.0, -1e9).to(scores.dtype) + scores
        case "add of 1 - m":
            return scores + (1.0 - seen.to(scores.dtype)) * lowest
    raise AssertionError(fill)


@st.composite
def programs(draw: Callable[..., Any]) -> Program:
    """Any combination of elements that is well formed."""

    def rarely(elements: tuple[str, ...]) -> str | None:
        return draw(st.sampled_from(elements)) if draw(st.integers(0, 7)) == 7 else None

    layout = draw(st.sampled_from(["heads first", "heads second", "packed", "sequence first", "folded", "frames"]))
    kv_heads = draw(st.sampled_from([2, 1, 3]))
    groups = 1 if layout in ("folded", "frames") else draw(st.sampled_from([1, 1, 2, 3]))
    sharings = ["repeat_interleave", "repeat_kv", "index", "grouped"] + (["expand", "broadcast"] * (kv_heads == 1))
    sharing = draw(st.sampled_from(sharings)) if groups > 1 else "none"
    products, value_products = ["matmul", "@ mT", "einsum", "multiply and sum", "keys first"], ["matmul", "einsum"]
    value_products += ["multiply and sum", "values first"]
    if layout == "folded":
        products, value_products = ["bmm", "baddbmm", "matmul", "einsum"], ["bmm", "matmul", "einsum"]
    elif layout != "frames" and sharing not in ("grouped", "broadcast"):
        products.append("einsum with heads")
    q_len = draw(st.sampled_from([7, 5, 13] if layout == "packed" else [7, 5, 13, 1]))
    # A cache makes more keys than queries; packed are both from the same tokens.
    # The weight of a single key is 1, whatever the scores: a query by itself has more keys.
    more_keys = [0, 0, 4] if q_len > 1 else [4]
    kv_len = q_len if layout == "packed" else q_len + draw(st.sampled_from(more_keys))
    width = draw(st.sampled_from([8, 6, 16]))
    plain = layout not in ("frames", "folded") and sharing != "grouped"
    edit = rarely(EDITS) if plain else None
    normaliser = draw(st.one_of(st.just("softmax"), st.sampled_from(NORMALISERS)))
    if normaliser == "learned column" and not plain:
        normaliser = "zero column"
    biases = tuple(b for b in BIASES if draw(st.integers(0, 5)) == 5 and (b != "decomposed" or plain))
    masks = draw(st.lists(st.tuples(st.sampled_from(MASKS), st.sampled_from(FILLS)), max_size=2))
    places = st.sampled_from(["queries", "keys", "scores"])
    spellings = st.sampled_from(["times", "divided", "times", "divided", "tensor", "learned"])
    return Program(
        layout=layout,
        product=draw(st.sampled_from(products)),
        value_product=draw(st.sampled_from(value_products)),
        sharing=sharing,
        batch=draw(st.sampled_from([2, 1, 3])),
        kv_heads=kv_heads,
        groups=groups,
        q_len=q_len,
        kv_len=kv_len,
        width=width,
        v_width=draw(st.sampled_from([width, 10])),
        scales=tuple(draw(st.lists(st.tuples(places, spellings, st.sampled_from(NUMBERS)), max_size=2))),
        softcap=draw(st.sampled_from([None, None, None, 5.0])),
        biases=biases,
        masks=tuple(masks),
        normaliser=normaliser,
        dropout=draw(st.booleans()),
        edit=edit,
        output=draw(st.sampled_from(["as it is", "flatten", "contiguous view"])),
        dtype=draw(st.sampled_from(["float32", "float32", "float32", "bfloat16"])),
        seed=draw(st.integers(0, 99)),
    )


# --- what only looks like attention ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LookAlike:
    """A computation with a normaliser and a product that is no attention."""

    kind: str
    normaliser: str
    batch: int
    length: int
    width: int
    seed: int

    def module(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return LookAlikeModule(self)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(self.seed + 1)
        q, k, v = torch.randn(3, self.batch, self.length, self.width).unbind(0)
        return q, k, v


KINDS = (
    "classifier", "router", "prototypes", "codebook", "contrastive", "linear attention", "gate", "squeeze-excite",
    "weighted mean", "log-likelihood", "mixer",
)  # fmt: skip


class LookAlikeModule(nn.Module):
    """A look-alike that runs."""

    def __init__(self, alike: LookAlike) -> None:
        super().__init__()
        self.alike = alike
        self.linear, self.next = nn.Linear(alike.width, 5), nn.Linear(5, 3)
        self.table = nn.Parameter(torch.randn(5, alike.width))
        self.experts = nn.Parameter(torch.randn(5, alike.width, alike.width))
        self.tokens = nn.Parameter(torch.randn(alike.length, alike.length))

    def weights(self, scores: Tensor, dim: int = -1) -> Tensor:
        match self.alike.normaliser:
            case "softmax":
                return scores.softmax(dim)
            case "decomposed":
                weights = (scores - scores.amax(dim, keepdim=True)).exp()
                return weights / weights.sum(dim, keepdim=True)
            case "sigmoid":
                return scores.sigmoid()
        return scores.log_softmax(dim).exp()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        match self.alike.kind:
            case "classifier":
                return self.next(self.weights(self.linear(q)))
            case "router":
                outs = torch.einsum("bsd,edf->bsef", q, self.experts)
                return torch.einsum("bse,bsef->bsf", self.weights(self.linear(q)), outs)
            case "prototypes":
                return self.weights(q @ self.table.mT) @ self.table
            case "codebook":
                return self.weights(self.linear(q)) @ self.table
            case "contrastive":
                return -self.weights(q @ k.mT).log().diagonal(dim1=-2, dim2=-1).mean()
            case "linear attention":
                features, keys = F.elu(q) + 1, F.elu(k) + 1
                out = features @ (keys.mT @ v)
                return out / (features @ keys.sum(-2).unsqueeze(-1))
            case "gate":
                return q * self.weights(q.mean(-2, keepdim=True)) + v
            case "squeeze-excite":
                return q * (q.mean(1) @ self.table.mT).relu().matmul(self.table).sigmoid()[:, None]
            case "weighted mean":
                return (self.weights(q, 1) * v).sum(1)
            case "log-likelihood":
                return self.weights(self.linear(q)).log().gather(-1, torch.zeros_like(q[..., :1], dtype=torch.long))
            case "mixer":
                return F.gelu(self.tokens @ q) * self.weights(v)
        raise AssertionError(self.alike.kind)


look_alikes = st.builds(
    LookAlike,
    kind=st.sampled_from(KINDS),
    normaliser=st.sampled_from(["softmax", "decomposed", "log_softmax", "sigmoid"]),
    batch=st.sampled_from([1, 2, 3]),
    length=st.sampled_from([7, 1, 4, 13]),
    width=st.sampled_from([8, 6]),
    seed=st.integers(0, 99),
)
"""Look-alikes of random kinds and sizes."""
