"""The search of tune.py."""
