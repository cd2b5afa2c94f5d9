"""The demo: a small arithmetic agent that runs the whole loop on the embedded engine."""
