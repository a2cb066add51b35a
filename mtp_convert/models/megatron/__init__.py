"""Megatron-Core's GPT and hybrid models with Multi-Token Prediction, in plain PyTorch."""
