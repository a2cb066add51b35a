"""Runs a plan: files laid out in advance, filled window by window in constant memory."""
