"""Drawing from a run: samples, roll-outs, restored pictures; guides and exact caches."""
