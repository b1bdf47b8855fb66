"""The report of runs: one HTML file, or a page that follows a run. No torch."""
