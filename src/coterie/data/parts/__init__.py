"""Parts of other sources: some classes, the shard of an island."""
