"""Finds plugins, checks the classes that they register, times their objects, and replaces
those that fail. Contains the built-in eviction and scheduler policies."""
