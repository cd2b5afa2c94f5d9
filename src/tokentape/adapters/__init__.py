"""One module per agent framework or trainer; each uses tokentape's public API only."""
