"""``fusiontree report``: runs as one HTML page that needs nothing but itself."""

from fusiontree.report.page import write_report

__all__ = ["write_report"]
