"""The split: loaded, turned into tokens, cut into rows, planned in batches.

Imports `file` for the layout of those rows, and the modules beside the packages.
"""
