"""Behind sample.py: prompts, batches of texts, classifiers, proof-reading, terminal."""
