"""Training: DeepSpeed, optimizer, moving average, checkpoints, ranks, what is recorded. The loop itself is
stdit/train.py."""
