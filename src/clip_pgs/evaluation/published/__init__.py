"""Figures that papers print, as package data: the reference rows of the report."""

from clip_pgs.evaluation.published.paper import PAPER, Paper, PublishedMethod, read_paper

__all__ = ["PAPER", "Paper", "PublishedMethod", "read_paper"]
