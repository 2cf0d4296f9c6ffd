"""The ranks: how they find each other, agree, deliver payloads to the leader, and end together.

Imports `file` for arrays alone: payloads travel as bytes.
"""
