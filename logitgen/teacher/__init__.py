"""The teacher: described, loaded, probed, run over batches, and the values captured from its logits.

Imports `file` and `split`. It knows no ranks but the process groups in a shared teacher's own layers.
"""
