"""The demo world: generated pictures with captions, to train and to evaluate on without a download.

`vocabulary` names what there is; a `scene` is plain data made from it; `draw` turns it into pixels
and a foreground mask, `captions` into a sentence; `variants` draws it as training never shows it,
and `hard_negatives` says of it what is nearly true; `splits` says which scenes the world holds,
`parts` what its folders are, and `writing` writes them down.
"""

from clip_pgs.data.world.captions import caption
from clip_pgs.data.world.draw import Drawing, draw_scene
from clip_pgs.data.world.scene import Scene, Thing, make_scene
from clip_pgs.data.world.vocabulary import WORLD_VERSION
from clip_pgs.data.world.writing import (
    NUM_PER_CLASS,
    NUM_TRAIN,
    NUM_VAL,
    describe_world,
    write_world,
)

__all__ = [
    "NUM_PER_CLASS",
    "NUM_TRAIN",
    "NUM_VAL",
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
