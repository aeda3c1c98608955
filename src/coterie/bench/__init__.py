"""Floor 8: how fast the library is here, beside its peers: one module for each ``coterie bench`` command."""
