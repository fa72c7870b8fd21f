"""Checkpoints: layout and verification, asynchronous saving, tensors read on demand."""
