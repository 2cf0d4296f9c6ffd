"""The teacher: described, loaded, probed, run over batches, and what is kept of its logits.

Imports `file` and `split`; knows nothing of ranks, but for the process groups a shared teacher's own layers use.
"""
