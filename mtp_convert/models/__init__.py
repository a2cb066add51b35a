"""Models that run, for checking what was converted. They share no table with the converter."""
