"""The demo world: generated pictures with captions, to train and to evaluate on without a download.

A `scene` is plain data made of the words there; `draw` turns it into pixels and a foreground mask,
on one of the `backgrounds`, also as training never shows it; `captions` says what is in it, and
what is nearly true; `splits` says which scenes the world holds, and `writing` writes them down.
"""

from clip_pgs.data.world.captions import caption
from clip_pgs.data.world.draw import Drawing, draw_scene
from clip_pgs.data.world.scene import WORLD_VERSION, Scene, Thing, make_scene
from clip_pgs.data.world.writing import describe_world, write_world

__all__ = [
    "WORLD_VERSION",
    "Drawing",
    "Scene",
    "Thing",
    "caption",
    "describe_world",
    "draw_scene",
    "make_scene",
    "write_world",
]
