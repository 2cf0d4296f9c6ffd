"""The leader's side: the claimed output, the writer, and the progress it shows and stores for other processes.

Imports `file` and `split`.
"""
