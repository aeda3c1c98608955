"""Inspection of routing: traces, statistics, plots and a report.

It reads :class:`coterie.core.routing.Routing` records only, never a model.
"""

from coterie.inspect.page.anomaly_verdicts import Verdict, verdicts
from coterie.inspect.page.findings import Finding, findings, sentences
from coterie.inspect.page.report import report_outputs, write_report
from coterie.inspect.page.report_data import ReportData
from coterie.inspect.page.terminal_table import text_summary
from coterie.inspect.phrases import label_name, noise_name
from coterie.inspect.plots.gates import GateMaps
from coterie.inspect.statistics.accumulators import Place
from coterie.inspect.statistics.anomalies import Anomalies, Answers, analyse_anomalies
from coterie.inspect.statistics.expert_answers import AnswerSums
from coterie.inspect.statistics.experts_per_row import Amounts, analyse_amounts
from coterie.inspect.statistics.formulas import off_diagonal_mean
from coterie.inspect.statistics.pairs import PairStats, analyse_pairs
from coterie.inspect.statistics.pools import PoolStats, analyse_pools
from coterie.inspect.statistics.routers import RouterStats, analyse
from coterie.inspect.statistics.trace import StepTrace, Trace

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
