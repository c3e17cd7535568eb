"""Reports: `clip-pgs test report RESULTS... -o report/`."""
