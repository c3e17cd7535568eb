"""The steps by which PGS (https://arxiv.org/abs/2503.17080) arrives at a selection, as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from clip_pgs.figure import INK, PAPER, Column, Legend, Panel
from clip_pgs.masking import PatchInputs, sinkhorn_plan
from clip_pgs.masking.pgs import PGSMasking, reached_similarity
from clip_pgs.masking.schedule import scheduled_ratio

# From dark over red to pale yellow: read as heat, and in gray print still from dark to light.
_HEAT = ("#0b0724", "#4a1079", "#a1307e", "#e95562", "#feae76", "#fcfdbf")
# Color-blind readers tell these apart, too.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#56B4E9", "#CC79A7")
_PALE = 0.55  # share of white over what is not to be looked at


_HALO: dict[str, Any] = {"stroke_width": 2, "stroke_fill": PAPER}


@dataclass(frozen=True)
class Stages:
    """What PGS finds on its way.

    Attributes:
        edges: Edge strength in [0, 1], shape (B, N). None where edges are left out.
        candidates: Positions of the candidates, ascending, shape (B, C), int64.
        owner: Which candidate takes most of a patch, in [0, C), shape (B, N), int64.
        share: How much of the patch that candidate takes, in [0, 1], shape (B, N). Without
            transport, the similarity between the two where it is positive.
        scores: What the selection sorts by, candidates not lifted, shape (B, N).
        random_share: Share of the kept patches that is drawn at this progress, whatever their
            scores.
    """

    edges: Tensor | None
    candidates: Tensor
    owner: Tensor
    share: Tensor
    scores: Tensor
    random_share: float


@torch.no_grad()
def pgs_stages(strategy: PGSMasking, inputs: PatchInputs) -> Stages:
    """Follow PGS through its steps.

    Args:
        strategy: Its options decide each step.
        inputs: What it looks at; `noise` is given.

    Raises:
        ValueError: If `inputs` lack the noise.
    """
    if inputs.noise is None:
        raise ValueError("the stages of one selection need its noise, got none")
    edges_BN, candidates_BC, scores_BN = strategy.steps(inputs, inputs.noise)
    candidates_BC = candidates_BC.sort(dim=1).values
    options = strategy.options
    share_BCN = reached_similarity(inputs, candidates_BC, options.neighborhood)
    if options.transport:
        share_BCN = inputs.num_patches * sinkhorn_plan(share_BCN, **options.sinkhorn())
    most = share_BCN.max(dim=1)
    start, end = options.random_share, options.random_share_end
    if options.random_images == 1:
        start, end = 1.0, None
    return Stages(
        edges_BN,
        candidates_BC,
        owner=most.indices,
        share=most.values.clamp(0, 1),
        scores=scores_BN,
        random_share=float(scheduled_ratio(start, end, progress=inputs.progress)),
    )


def stage_columns(
    strategy: PGSMasking, stages: Stages, pictures: Tensor, grid_size: tuple[int, int]
) -> list[Column]:
    """Draw the steps of PGS, a column each.

    Args:
        strategy: Whose steps they are.
        stages: Of B images.
        pictures: The images to draw on, in [0, 1]. Shape (B, 3, H, W).
        grid_size: (h, w) in patches.
    """
    canvas = _Canvas(pictures, grid_size, stages.candidates)
    columns = [
        _candidate_column(strategy, stages, canvas),
        _plan_column(strategy, stages, canvas),
        _score_column(strategy, stages, canvas),
    ]
    return columns if stages.edges is None else [_edge_column(stages.edges, canvas), *columns]


def kept_legend(strategy: PGSMasking, stages: Stages) -> Legend:
    """Say by what the patches are chosen that the model sees."""
    drawn, images = stages.random_share, strategy.options.random_images
    if drawn == 1:
        return Legend("What the model sees is drawn at random, whatever the scores.")
    text = "The highest scores are masked, the rest is what the model sees."
    if drawn:
        text = f"The lowest scores are kept, and {drawn:.2g} of what the model sees is drawn."
    if images:
        text += f" In {images:.2g} of the images all of it is drawn."
    return Legend(text)


class _Canvas:
    """Images in gray and white, where their patches lie, and which of them are candidates."""

    def __init__(self, pictures: Tensor, grid_size: tuple[int, int], candidates_BC: Tensor) -> None:
        self.grid_size = grid_size
        self.cell = (pictures.shape[2] // grid_size[0], pictures.shape[3] // grid_size[1])
        self.pictures = pictures
        gray = pictures.mean(dim=1, keepdim=True).expand_as(pictures)
        self.ghosts = gray * (1 - _PALE) + _PALE
        self.candidates = candidates_BC
        self.colors = _candidate_colors(candidates_BC.shape[1])

    def spread(self, colors_BN3: Tensor) -> Tensor:
        """Fill each patch with its color, shape (B, 3, H, W)."""
        cells = colors_BN3.unflatten(1, self.grid_size).permute(0, 3, 1, 2)
        return cells.repeat_interleave(self.cell[0], 2).repeat_interleave(self.cell[1], 3)

    def panels(
        self, pixels: Tensor, captions: Sequence[str], frames_C3: Tensor | None = None
    ) -> list[Panel]:
        """Return pictures with their captions, and numbered frames where these have colors."""
        (height, width), num_columns = self.cell, self.grid_size[1]
        drawn = list(map(to_pil_image, pixels))
        font = ImageFont.load_default(min(height, width) // 2)
        for picture, positions in zip(drawn, self.candidates.tolist(), strict=True):
            draw = ImageDraw.Draw(picture)
            frames = () if frames_C3 is None else zip(positions, frames_C3.tolist(), strict=True)
            for number, (position, color) in enumerate(frames, start=1):
                y, x = position // num_columns * height, position % num_columns * width
                box = (x, y, x + width - 1, y + height - 1)
                outline = tuple(round(255 * value) for value in color)
                draw.rectangle(box, outline=outline, width=max(2, width // 8))
                center = (x + width / 2, y + height / 2)
                draw.text(center, str(number), fill=INK, font=font, anchor="mm", **_HALO)
        return list(zip(drawn, captions, strict=True))


def _edge_column(edges_BN: Tensor, canvas: _Canvas) -> Column:
    captions = [f"mean {edges.mean():.2f}" for edges in edges_BN]
    text = "Edge strength of each patch, scaled from 0 to 1 in each image."
    legend = Legend(text, _heat_ramp(), ("0: flat", "1: strongest"))
    return Column("1  edges", canvas.panels(canvas.spread(_heat(edges_BN)), captions), legend)


def _candidate_column(strategy: PGSMasking, stages: Stages, canvas: _Canvas) -> Column:
    num_images, num_candidates = stages.candidates.shape
    is_candidate_BN = torch.zeros_like(stages.scores).scatter(1, stages.candidates, 1)
    masks = canvas.spread(is_candidate_BN[:, :, None].expand(-1, -1, 3))
    drawn = torch.where(masks > 0, canvas.pictures, canvas.ghosts)
    where = "" if strategy.options.candidate_region == "image" else " of the border"
    text = f"Patches{where} drawn at random, to stand for what may go"
    options = strategy.options
    edge_weight = options.edge_protection if options.edges else 0
    spared = _listed(("where edges are", edge_weight), ("in the middle", options.center_weight))
    text += f", rarely {spared}." if spared else "."
    captions = num_images * [f"{num_candidates} candidates"]
    return Column("2  candidates", canvas.panels(drawn, captions, canvas.colors), Legend(text))


def _plan_column(strategy: PGSMasking, stages: Stages, canvas: _Canvas) -> Column:
    num_patches, (num_images, num_candidates) = stages.scores.shape[1], stages.candidates.shape
    share = canvas.spread(stages.share[:, :, None].expand(-1, -1, 3))
    blended = canvas.spread(canvas.colors[stages.owner]) * share + canvas.ghosts * (1 - share)
    # A window limits what a candidate can take, and without a plan nothing is dealt out.
    is_even = strategy.options.transport and strategy.options.neighborhood is None
    captions = num_images * [f"{num_patches / num_candidates:.1f} patches each" if is_even else ""]
    panels = canvas.panels(blended, captions, 0.6 * canvas.colors)
    steps = torch.linspace(0, 1, 64)[:, None]
    ramp = _ramp(canvas.colors[0] * steps + (1 - steps) * (0.5 * (1 - _PALE) + _PALE))
    if strategy.options.transport:
        text = "The color is that of the candidate which takes most of a patch."
        return Column("3  plan", panels, Legend(text, ramp, ("takes none", "takes all of it")))
    text = "The color is that of the candidate which a patch resembles most."
    return Column("3  nearest", panels, Legend(text, ramp, ("0: unlike", "1: alike")))


def _score_column(strategy: PGSMasking, stages: Stages, canvas: _Canvas) -> Column:
    low_B1, high_B1 = stages.scores.aminmax(dim=1, keepdim=True)
    scaled_BN = (stages.scores - low_B1) / (high_B1 - low_B1).clamp_min(1e-9)
    ends = zip(low_B1.flatten().tolist(), high_B1.flatten().tolist(), strict=True)
    captions = [f"{low:.2f} to {high:.2f}" for low, high in ends]
    white = torch.ones_like(canvas.colors)
    panels = canvas.panels(canvas.spread(_heat(scaled_BN)), captions, white)
    options = strategy.options
    edge_weight = options.edge_weight if options.edges else 0
    less = _listed(("its edges", edge_weight), ("the middle", options.center_weight))
    text = f"How redundant a patch is, less {less}." if less else "How redundant a patch is."
    if stages.random_share or options.random_images:
        return Column("4  score", panels, Legend(text, _heat_ramp(), ("low", "high")))
    text += " Candidates (framed) are masked first."
    return Column("4  score", panels, Legend(text, _heat_ramp(), ("kept", "masked")))


def _listed(*parts: tuple[str, float]) -> str:
    return " and ".join(name for name, weight in parts if weight)


def _heat(values: Tensor) -> Tensor:
    """Color values in [0, 1], of any shape; the result has a last dimension of 3 more."""
    anchors = torch.tensor([ImageColor.getrgb(text) for text in _HEAT]) / 255
    position = values.clamp(0, 1) * (len(_HEAT) - 1)
    below = position.floor().long().clamp_max(len(_HEAT) - 2)
    part = (position - below)[..., None]
    return anchors[below] * (1 - part) + anchors[below + 1] * part


def _candidate_colors(num_candidates: int) -> Tensor:
    """Return colors that are told apart, shape (C, 3), in [0, 1]."""
    # Those of Okabe and Ito, then darker ones; a further candidate has its number alone.
    colors = torch.tensor([ImageColor.getrgb(text) for text in _COLORS]) / 255
    return torch.cat([colors, 0.55 * colors]).repeat(math.ceil(num_candidates / 14), 1)[
        :num_candidates
    ]


def _heat_ramp() -> Image.Image:
    return _ramp(_heat(torch.linspace(0, 1, 64)))


def _ramp(colors_N3: Tensor) -> Image.Image:
    return to_pil_image(colors_N3.T[:, None, :].contiguous())
