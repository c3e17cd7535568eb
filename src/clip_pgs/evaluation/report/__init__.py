"""Reports: `python -m clip_pgs.evaluation report RESULTS... -o report/`."""

from clip_pgs.evaluation.report.write import write_report

__all__ = ["write_report"]
