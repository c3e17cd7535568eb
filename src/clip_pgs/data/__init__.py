"""Images with captions: the demo world, shards of one's own, and the ordered sample stream."""
