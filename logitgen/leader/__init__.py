"""The leader's side: the output it claims, the writer, the progress it shows and leaves for whoever looks.

Imports `file` and `split`.
"""
