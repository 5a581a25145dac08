"""A run on one page."""

from spkid.evaluation.report.write import write_report

__all__ = ["write_report"]
