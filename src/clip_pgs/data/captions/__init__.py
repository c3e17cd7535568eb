"""Captions before they become tokens: masks of words, and the counts behind them."""
