"""Who does what: traces of routings, their statistics, and a report for people.

Reads :class:`coterie.core.routing.Routing` records and nothing of a model.
"""

from coterie.inspect.amounts import Amounts, analyse_amounts
from coterie.inspect.anomalies import Anomalies, Answers, analyse_anomalies
from coterie.inspect.anomaly_verdicts import Verdict, verdicts
from coterie.inspect.answers import AnswerSums
from coterie.inspect.content import ReportData
from coterie.inspect.findings import Finding, findings, sentences
from coterie.inspect.pairs import PairStats, analyse_pairs
from coterie.inspect.plots.gates import GateMaps
from coterie.inspect.pools import PoolStats, analyse_pools
from coterie.inspect.report import report_outputs, write_report
from coterie.inspect.routers import RouterStats, analyse
from coterie.inspect.stats import off_diagonal_mean
from coterie.inspect.summary import text_summary
from coterie.inspect.tables import Place
from coterie.inspect.trace import StepTrace, Trace
from coterie.inspect.words import label_name, noise_name

__all__ = [
    "Amounts",
    "Anomalies",
    "AnswerSums",
    "Answers",
    "Finding",
    "GateMaps",
    "PairStats",
    "Place",
    "PoolStats",
    "ReportData",
    "RouterStats",
    "StepTrace",
    "Trace",
    "Verdict",
    "analyse",
    "analyse_amounts",
    "analyse_anomalies",
    "analyse_pairs",
    "analyse_pools",
    "findings",
    "label_name",
    "noise_name",
    "off_diagonal_mean",
    "report_outputs",
    "sentences",
    "text_summary",
    "verdicts",
    "write_report",
]
