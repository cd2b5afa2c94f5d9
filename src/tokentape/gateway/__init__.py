"""The gateway: provider wires in front, the turn behind them."""
