"""The report: one self-contained HTML page about a run, for a person who is no engineer and for one who is."""

from bylaw.report.page import ReportConfig, write_report

__all__ = ["ReportConfig", "write_report"]
