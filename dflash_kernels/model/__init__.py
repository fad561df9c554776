"""Drafter configuration, checkpoint loading and the demo target."""
