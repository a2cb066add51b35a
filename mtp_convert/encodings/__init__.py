"""Stored forms of values: element types and casts."""
