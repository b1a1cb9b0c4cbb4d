"""Pretrained encoders that networks can be built on."""
