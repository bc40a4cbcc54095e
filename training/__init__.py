"""Behind train.py: optimizer, times, fused loss, forms, checkpoints, run folder, log."""
