"""Measuring what masking costs and saves."""
