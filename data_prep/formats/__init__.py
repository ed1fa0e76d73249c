"""The three containers: how a shard is written, and how one is read without an index."""
