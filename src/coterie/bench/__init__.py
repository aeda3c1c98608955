"""Floor 8: how fast the library is, beside its peers: a module for each ``coterie bench`` verb."""
