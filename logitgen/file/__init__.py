"""The file: its layout, its head, its records, how to read it and how to prove it right.

numpy and h5py alone, no torch: a file can be looked into anywhere. Imports nothing but `errors`.
"""
