"""The student's side: rows as tensors, the loss, the export to other formats.

Imports `file`, `head` and `tokenizer`, but no split, ranks or leader: training needs nothing of a capture.
"""
