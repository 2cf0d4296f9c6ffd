"""The teacher: described, loaded, probed, run over batches, and the values captured from its logits.

Imports `file` and `split`. Of ranks it knows only the process groups inside a shared teacher's own layers.
"""
