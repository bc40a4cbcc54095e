"""Behind sample.py: prompts, batches of texts, guidance, proof-reading, terminal."""
