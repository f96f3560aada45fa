"""What is told about models: tables, and the figures behind them."""
