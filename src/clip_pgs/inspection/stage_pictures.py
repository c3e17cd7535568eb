"""Pictures of the steps of PGS: edges, candidates, transport plan, scores."""

from __future__ import annotations

import colorsys

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from clip_pgs.inspection.figure import Column, Legend, Panel
from clip_pgs.inspection.stages import Stages
from clip_pgs.masking.pgs import PGSMasking

# From dark over red to pale yellow: read as heat, and in grey print still from dark to light.
_HEAT = ("#0b0724", "#4a1079", "#a1307e", "#e95562", "#feae76", "#fcfdbf")
_PALE = 0.55  # share of white over what is not to be looked at
_OUTLINE = "white"


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
    canvas = _Canvas(pictures, grid_size)
    columns = [
        _candidate_column(strategy, stages, canvas),
        _plan_column(strategy, stages, canvas),
        _score_column(strategy, stages, canvas),
    ]
    if stages.edges is not None:
        columns.insert(0, _edge_column(stages.edges, canvas))
    return columns


class _Canvas:
    """Images in grey and white, and where their patches lie."""

    def __init__(self, pictures: Tensor, grid_size: tuple[int, int]) -> None:
        self.grid_size = grid_size
        self.cell = (pictures.shape[2] // grid_size[0], pictures.shape[3] // grid_size[1])
        self.pictures = pictures
        grey = pictures.mean(dim=1, keepdim=True).expand_as(pictures)
        self.ghosts = grey * (1 - _PALE) + _PALE

    def spread(self, colors_BN3: Tensor) -> Tensor:
        """Fill each patch with its colour, shape (B, 3, H, W)."""
        cells = colors_BN3.unflatten(1, self.grid_size).permute(0, 3, 1, 2)
        return cells.repeat_interleave(self.cell[0], 2).repeat_interleave(self.cell[1], 3)

    def outline(self, picture: Image.Image, position: int, color: str) -> None:
        """Draw a frame just inside a patch."""
        (height, width), columns = self.cell, self.grid_size[1]
        y, x = position // columns * height, position % columns * width
        box = (x, y, x + width - 1, y + height - 1)
        ImageDraw.Draw(picture).rectangle(box, outline=color, width=max(2, width // 7))


def _edge_column(edges_BN: Tensor, canvas: _Canvas) -> Column:
    panels: list[Panel] = [
        (to_pil_image(picture), f"mean {edges.mean():.2f}")
        for picture, edges in zip(canvas.spread(heat(edges_BN)), edges_BN, strict=True)
    ]
    text = "Edge strength of each patch, scaled from 0 to 1 in each image."
    return Column("1  edges", panels, Legend(text, _heat_ramp(), ("0: flat", "1: strongest")))


def _candidate_column(strategy: PGSMasking, stages: Stages, canvas: _Canvas) -> Column:
    panels: list[Panel] = []
    num_candidates = stages.candidates.shape[1]
    for number, ghost in enumerate(canvas.ghosts):
        is_candidate_N = torch.zeros(stages.scores.shape[1])
        is_candidate_N[stages.candidates[number]] = 1
        mask = canvas.spread(is_candidate_N[None, :, None].expand(-1, -1, 3))[0]
        picture = to_pil_image(torch.where(mask > 0, canvas.pictures[number], ghost))
        for candidate, position in enumerate(stages.candidates[number].tolist()):
            canvas.outline(picture, position, _hex(candidate_colors(num_candidates)[candidate]))
        panels.append((picture, f"{num_candidates} candidates"))
    where = "" if strategy.options.candidate_region == "image" else " of the border"
    text = f"Patches{where} drawn at random, to stand for what may go"
    text += ", rarely where edges are." if strategy.options.edges else "."
    return Column("2  candidates", panels, Legend(text))


def _plan_column(strategy: PGSMasking, stages: Stages, canvas: _Canvas) -> Column:
    num_patches, num_candidates = stages.scores.shape[1], stages.candidates.shape[1]
    colors_C3 = candidate_colors(num_candidates)
    colors = canvas.spread(colors_C3[stages.owner])
    share = canvas.spread(stages.share[:, :, None].expand(-1, -1, 3))
    blended = colors * share + canvas.ghosts * (1 - share)
    panels: list[Panel] = []
    for number, picture in enumerate(map(to_pil_image, blended)):
        for candidate, position in enumerate(stages.candidates[number].tolist()):
            canvas.outline(picture, position, _hex(0.6 * colors_C3[candidate]))
        # A window limits what a candidate can take, and without a plan nothing is dealt out.
        is_even = strategy.options.transport and strategy.options.neighborhood is None
        caption = f"{num_patches / num_candidates:.1f} patches each" if is_even else ""
        panels.append((picture, caption))
    steps = torch.linspace(0, 1, 64)[:, None]
    ramp = _ramp(colors_C3[0] * steps + (1 - steps) * (0.5 * (1 - _PALE) + _PALE))
    if strategy.options.transport:
        text = "The colour is that of the candidate which takes most of a patch."
        return Column("3  plan", panels, Legend(text, ramp, ("takes none", "takes all of it")))
    text = "The colour is that of the candidate which a patch resembles most."
    return Column("3  nearest", panels, Legend(text, ramp, ("0: unlike", "1: alike")))


def _score_column(strategy: PGSMasking, stages: Stages, canvas: _Canvas) -> Column:
    low, high = stages.scores.aminmax(dim=1, keepdim=True)
    scaled_BN = (stages.scores - low) / (high - low).clamp_min(1e-9)
    panels: list[Panel] = []
    for number, picture in enumerate(map(to_pil_image, canvas.spread(heat(scaled_BN)))):
        for position in stages.candidates[number].tolist():
            canvas.outline(picture, position, _OUTLINE)
        panels.append((picture, f"{low[number].item():.2f} to {high[number].item():.2f}"))
    text = "How redundant a patch is"
    text += ", less its edges." if strategy.options.edges else "."
    text += " Candidates (framed) are masked first."
    return Column("4  score", panels, Legend(text, _heat_ramp(), ("kept", "masked")))


def heat(values: Tensor) -> Tensor:
    """Colour values in [0, 1], of any shape; the result has a last dimension of 3 more."""
    anchors = torch.tensor([_rgb(text) for text in _HEAT])
    position = values.clamp(0, 1) * (len(_HEAT) - 1)
    below = position.floor().long().clamp_max(len(_HEAT) - 2)
    part = (position - below)[..., None]
    return anchors[below] * (1 - part) + anchors[below + 1] * part


def candidate_colors(num_candidates: int) -> Tensor:
    """Return colours that are told apart, shape (C, 3), in [0, 1]."""
    # Neighbours in the list lie far apart on the circle of hues, and differ in brightness.
    hues = [(number * 0.381966) % 1.0 for number in range(num_candidates)]
    values = [(0.95, 0.72)[number % 2] for number in range(num_candidates)]
    return torch.tensor(
        [colorsys.hsv_to_rgb(h, 0.85, v) for h, v in zip(hues, values, strict=True)]
    )


def _heat_ramp() -> Image.Image:
    return _ramp(heat(torch.linspace(0, 1, 64)))


def _ramp(colors_N3: Tensor) -> Image.Image:
    return to_pil_image(colors_N3.T[:, None, :].contiguous())


def _rgb(text: str) -> tuple[float, ...]:
    return tuple(int(text[start : start + 2], 16) / 255 for start in (1, 3, 5))


def _hex(color_3: Tensor) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in color_3.tolist())
