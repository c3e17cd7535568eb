"""The demo world: generated pictures with captions, to train and to evaluate on without a download.

A `scene` is plain data made of the words there; `draw` turns it into pixels and a foreground mask,
on one of the `backgrounds`, also as training never shows it; `captions` says what is in it, and
what is nearly true; `splits` says which scenes the world holds, and `writing` writes them down.
"""
