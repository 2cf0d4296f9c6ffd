"""The file: its layout, its head, its records, its reader and its verification.

It needs numpy and h5py alone, no torch: a file can be inspected anywhere. Imports nothing but `errors`.
"""
