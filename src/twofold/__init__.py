"""twofold measures and regularises both halves of the Hessian, H = GN + NME, of any PyTorch model."""

__version__ = "0.1.0"
