"""Plots of a report. matplotlib is imported when the first one is drawn."""
