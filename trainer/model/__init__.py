"""The backbone, its head and the adapter."""
