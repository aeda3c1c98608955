"""Floor 6: a run directory and all that is done with it.

Here every part is registered that a run may be made of but lies above its floor: sources and models
that are other runs, and networks of other libraries.
"""

import coterie.interop.diffusers.expert
import coterie.runs.islands
import coterie.runs.origins.synthetic_data
import coterie.runs.origins.trained_model
import coterie.solvers.network_guidance  # noqa: F401
