"""What the spine stands on to use more processes and devices."""
