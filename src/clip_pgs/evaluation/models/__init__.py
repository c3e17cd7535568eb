"""Models to evaluate: opening them, and what can be said of their weights."""
