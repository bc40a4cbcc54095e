"""Commands that few need: statistics of a text, normalising it, classifiers, exports."""
