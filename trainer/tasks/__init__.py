"""What a label is: its encoding, loss, metrics and predictions."""
