"""Reports: `python -m clip_pgs.evaluation report RESULTS... -o report/`."""
