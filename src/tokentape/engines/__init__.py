"""Engines: what turns prompt ids into sampled ids."""
