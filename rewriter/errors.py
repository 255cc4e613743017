"""Every way in which the library says no: one sentence that names the cause and the mend."""

from __future__ import annotations


class RewriterError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one sentence for a person."""


class CaptureError(RewriterError):
    """The model could not be captured as a graph."""


class NoAttentionError(RewriterError):
    """There is no attention in the model, so there is nothing to rewrite."""


class CalibrationError(RewriterError):
    """The calibration data is empty, has the wrong form, or the model cannot run on it."""


class MetricError(RewriterError):
    """The accuracy metric is unknown, raised, or gave something that is not a finite number."""


class OptionError(RewriterError):
    """An argument is outside what is accepted."""


class PlanError(RewriterError):
    """A plan is damaged, of an unknown format, or belongs to another model."""


class CheckpointError(RewriterError):
    """A checkpoint or a target cannot be loaded."""


class OutputError(RewriterError):
    """The place to write to cannot be used."""


class GuardError(RewriterError):
    """The accuracy bound could not be met, not even by the original model."""


def brief(cause: Exception) -> str:
    """One line of at most 200 characters."""
    text = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no message")
    text = text if len(text) <= 200 else text[:197] + "..."
    return text if isinstance(cause, MetricError) else f"{type(cause).__name__}: {text}"
