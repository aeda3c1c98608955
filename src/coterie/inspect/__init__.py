"""Who does what: traces of routings and their statistics.
Reads :class:`coterie.core.routing.Routing` records and nothing of a model.
"""

from coterie.inspect.findings import Finding, RouterStats, analyse, findings, sentences
from coterie.inspect.summary import text_summary
from coterie.inspect.trace import StepTrace, Trace

__all__ = [
    "Finding",
    "RouterStats",
    "StepTrace",
    "Trace",
    "analyse",
    "findings",
    "sentences",
    "text_summary",
]
