"""Figures, pages and comparisons of spectra."""
