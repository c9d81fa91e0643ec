"""From records and scores to tables, plots and pages."""
