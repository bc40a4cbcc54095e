"""Behind evaluate.py: bounds, exact likelihoods, tables, quality of samples."""
