"""The student's side: rows as tensors, the loss, the export to other formats.

Imports `file` and `head`; no split, ranks or leader, so that training needs nothing of a capture.
"""
