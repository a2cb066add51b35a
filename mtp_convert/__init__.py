"""Convert checkpoints with Multi-Token Prediction (MTP) heads between training and serving stacks."""

__version__ = "0.1.0"
