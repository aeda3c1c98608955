"""The registry of objectives."""

from coterie.core.registry import Registry

OBJECTIVES = Registry("objective", "coterie.objectives")
