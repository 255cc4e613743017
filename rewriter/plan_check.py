"""Is a plan one that can be taken: does it make sense here, was it measured as it stands, is it for this model?"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from rewriter.code_of import changes
from rewriter.errors import OptionError, PlanError
from rewriter.fingerprint import differences, fingerprint
from rewriter.plan import FIDELITIES, GOALS, Decision, HeadGroup, Plan, decided, module_name
from rewriter.planfile import check_told_apart
from rewriter.settings import known_settings, wrong_setting
from rewriter.site import AttentionSite
from rewriter.target import Target
from rewriter.variant import ORIGINAL, Variant, variants


def read_plan(plan: Plan | str | os.PathLike[str]) -> Plan:
    """A plan or its file that makes sense: its variants are installed, are what it says they are and have the settings
    that it gives them. Raises PlanError.
    """
    if isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        raise OptionError(f"plan is a rewriter.Plan or the path of its file, not a {type(plan).__name__}")
    if plan.goal not in GOALS:
        raise PlanError(f"the plan is for the goal {plan.goal!r:.40}, not one of {', '.join(GOALS)}; tune again")
    device = plan.target.get("device", "cpu")
    try:
        torch.device(device if isinstance(device, str) else "")
    except RuntimeError as cause:
        raise PlanError(f"the plan was made for {device!r:.40}, which is no device; tune again") from cause
    for decision in plan.decisions:
        fidelity = max((variant_named(name).fidelity for name in decision.named), key=FIDELITIES.index)
        if decision.variant != ORIGINAL and fidelity != decision.fidelity:
            raise PlanError(
                f"the plan calls {decision.variant} at {decision.path} {decision.fidelity}, and it is {fidelity}; "
                "tune again"
            )
        if variant_named(decision.otherwise).fidelity != "exact":
            raise PlanError(
                f"the plan runs {decision.otherwise} at {decision.path} where nothing was measured, and "
                "it is not exact; tune again"
            )
        prefix = module_name(decision.path) + "."
        fitted = plan.guard is None or any(name.startswith(prefix) for name in plan.state)
        if decision.fidelity == "learned" and not fitted:
            raise PlanError(f"the plan has no parameters for {decision.variant} at {decision.path}; tune again")
    for decision in {(d.site, d.variant, str(d.config), str(d.heads)): d for d in plan.decisions}.values():
        _check_settings(decision)
    for path in plan.by_length:
        if any(d.fidelity == "learned" for d in plan.decisions if d.path == path):
            raise PlanError(f"the plan has a learned variant at {path or '<root>'} for some lengths only; tune again")
    check_told_apart(plan.decisions)
    return plan


def _check_settings(decision: Decision) -> None:
    where = f"the plan's decision at {decision.path or '<root>'}"
    groups = decision.heads or (HeadGroup(heads=(), variant=decision.variant, config=decision.config),)
    try:
        site = AttentionSite.parse(decision.site, decision.path)
        target = Target.current(site.device)
        known = [known_settings(variant_named(group.variant), site, target) for group in groups]
    except Exception as error:
        raise PlanError(f"{where} is for {decision.site!r:.40}, which is no attention; tune again") from error
    heads = sorted(head for group in decision.heads for head in group.heads)
    if heads and (len(heads) != site.kv_heads or heads != list(range(len(heads)))):
        raise PlanError(f"{where} does not hold each of its {site.kv_heads} heads once; tune again")
    if heads and (decision.config or decision.fidelity == "learned"):
        raise PlanError(f"{where} has settings or a learned variant, which heads that differ cannot have; tune again")
    for group, settings in zip(groups, known, strict=True):
        if wrong := wrong_setting(group.config, settings):
            raise PlanError(f"{where} cannot be taken: {group.variant} {wrong}; tune again")


def variant_named(name: str) -> Variant:
    """The variant, or a `PlanError` that names what is missing."""
    found = variants().get(name)
    if found is None:
        raise PlanError(f"the plan uses the variant {name!r}, which is not installed; known: {', '.join(variants())}")
    return found


_MEASURE = "tune again, or have it measured with optimize(model, calibration, plan=plan) or convert --revalidate"


def check_judged(plan: Plan) -> None:
    """Raises PlanError where the guard measured other decisions than the plan holds."""
    if plan.guard is not None and plan.judged != decided(plan.decisions):
        raise PlanError(f"the plan was edited by hand, and its guard measured other decisions; {_MEASURE}")


def check_guard(plan: Plan) -> None:
    """Raises PlanError where the guard measured other decisions, or did not find them within the bound."""
    check_judged(plan)
    if plan.guard is not None and plan.guard.get("held") is not True:
        raise PlanError(f"the guard did not find this plan within its bound; {_MEASURE}")


def check_model(plan: Plan, model: nn.Module, *, check_weights: bool = True) -> dict[str, Any]:
    """The model's fingerprint. Raises PlanError where the plan is not for this model: another structure, or, when the
    plan holds decisions that are not exact, other weights or code (their effect on the accuracy was measured on those).
    """
    ours, theirs = fingerprint(model, plan.model.get("written", ())), plan.model
    found = differences(ours, theirs)
    detail = f": {'; '.join(found[:3])}{f'; and {len(found) - 3} more' if len(found) > 3 else ''}" if found else ""
    if ours["structure"] != theirs["structure"]:
        raise PlanError(
            f"the plan is for another model, of {theirs['tensors']} tensors with {theirs['values']:,} values, where "
            f"this one has {ours['tensors']} with {ours['values']:,}{detail}; tune this model"
        )
    if check_weights and plan.fidelity != "exact" and ours["weights"] != theirs["weights"]:
        raise PlanError(
            f"the plan is for other weights of this architecture, and its accuracy was measured on those{detail}; tune "
            "again, have it measured on these with optimize(model, calibration, plan=plan), or take it unmeasured with "
            "apply(..., check_weights=False)"
        )
    changed = changes(ours["code"], theirs.get("code"))
    if check_weights and plan.fidelity != "exact" and changed:
        raise PlanError(
            f"the plan's accuracy was measured on other code: that of {', '.join(changed[:3])} "
            f"{f'and {len(changed) - 3} more ' if len(changed) > 3 else ''}is not what it was; {_MEASURE}, or take it "
            "unmeasured with apply(..., check_weights=False)"
        )
    return ours
