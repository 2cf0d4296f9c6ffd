"""The split: loaded, turned into tokens, cut into rows, planned in batches.

Imports `file` for the layout those rows are to have, and what stands beside the packages.
"""
