"""Attention, scoring and compaction on key-value pairs.

`reference` defines every operation in plain PyTorch; it runs everywhere and is what faster
implementations are compared with.
"""
