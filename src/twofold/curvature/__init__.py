"""H = GN + NME: operators, and estimators of their traces and norms."""
