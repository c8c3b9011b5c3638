"""Dropout whose masks depend on (seed, step, example, site) only."""
