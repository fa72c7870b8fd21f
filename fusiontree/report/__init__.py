"""``fusiontree report``: runs as one self-contained HTML page."""

from fusiontree.report.page import write_report

__all__ = ["write_report"]
