"""Proof by forward passes."""
