"""From files and hub data sets to token ids."""
