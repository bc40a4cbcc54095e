"""Comparisons, speed, the proof of a machine, and their record."""
