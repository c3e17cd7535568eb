"""The report's figures: bars per suite, a radar over three axes, accuracy by cost and epoch."""

from clip_pgs.evaluation.report.figures.bars import suite_figure
from clip_pgs.evaluation.report.figures.canvas import Figure, is_own_figure
from clip_pgs.evaluation.report.figures.cost import cost_figure
from clip_pgs.evaluation.report.figures.epochs import epochs_figure
from clip_pgs.evaluation.report.figures.radar import radar_figure

__all__ = [
    "Figure",
    "cost_figure",
    "epochs_figure",
    "is_own_figure",
    "radar_figure",
    "suite_figure",
]
