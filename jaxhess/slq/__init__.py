"""Stochastic Lanczos quadrature: the run, its checkpoint, and the spectrum that it gives."""
