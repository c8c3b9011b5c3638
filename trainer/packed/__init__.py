"""The forward pass that computes nothing for padding."""
