"""Webdataset shards: which there are, how large they are, and random access to their samples."""
