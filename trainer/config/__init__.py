"""Options, their ranges, recipes and the command line. Imports no torch."""
