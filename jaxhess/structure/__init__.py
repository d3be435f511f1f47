"""Structure of curvature: how blocks of parameters are coupled, and the spectrum of each."""
