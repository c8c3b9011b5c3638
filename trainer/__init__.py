"""Isotrain: fine-tunes transformer text classifiers with PEFT adapters, the same run on any hardware."""
