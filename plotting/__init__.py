"""Behind plot.py: the pictures, and the page of a run."""
