"""Metrics of answers, each one pure function of strings and numbers."""

from mova_core.metrics.text_match import exact_match, normalise

__all__ = ["exact_match", "normalise"]
