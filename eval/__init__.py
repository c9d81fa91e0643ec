"""Batch evaluation: testbeds, jobs, scorers, reports."""
