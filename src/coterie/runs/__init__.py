"""Runs: training, sampling and measuring in a run directory.

Importing this package registers the sources and models that are other runs, and networks of other
libraries.
"""

import coterie.interop.diffusers.expert
import coterie.runs.islands
import coterie.runs.origins.synthetic_data
import coterie.runs.origins.trained_model
import coterie.solvers.network_guidance  # noqa: F401
