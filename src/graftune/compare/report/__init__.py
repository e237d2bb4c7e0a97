"""One self-contained HTML page about one run, or about several side by side."""

from graftune.compare.report.report import render_report, write_report

__all__ = ["render_report", "write_report"]
