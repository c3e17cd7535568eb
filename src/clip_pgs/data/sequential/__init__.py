"""Shards that cannot be sought, such as URLs and pipes: read from the start."""
