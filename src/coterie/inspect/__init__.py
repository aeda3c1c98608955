"""Who does what: traces of routings, their statistics, and a report for people.

Reads :class:`coterie.core.routing.Routing` records and nothing of a model.
"""

from coterie.inspect.content import ReportData
from coterie.inspect.findings import Finding, findings, sentences
from coterie.inspect.report import write_report
from coterie.inspect.routers import RouterStats, analyse
from coterie.inspect.summary import text_summary
from coterie.inspect.trace import StepTrace, Trace

__all__ = [
    "Finding",
    "ReportData",
    "RouterStats",
    "StepTrace",
    "Trace",
    "analyse",
    "findings",
    "sentences",
    "text_summary",
    "write_report",
]
