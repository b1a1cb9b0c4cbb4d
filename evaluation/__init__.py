"""Evaluate models and data: drift against the training data."""
