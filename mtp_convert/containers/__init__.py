"""File formats: which bytes of which file are which tensor. No family is known here."""
