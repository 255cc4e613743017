"""Find every attention in a PyTorch model, by meaning, and replace it by the best of many efficient variants."""

from rewriter.api import apply, explain, optimize, plan_of, report_of, restore
from rewriter.errors import RewriterError
from rewriter.metrics import Metric
from rewriter.plan import Decision, Plan
from rewriter.report import Report
from rewriter.site import AttentionSite, Refusal
from rewriter.variant import Variant, register, unregister, variants

__all__ = [
    "AttentionSite",
    "Decision",
    "Metric",
    "Plan",
    "Refusal",
    "Report",
    "RewriterError",
    "Variant",
    "apply",
    "explain",
    "optimize",
    "plan_of",
    "register",
    "report_of",
    "restore",
    "unregister",
    "variants",
]
