"""The report page: its sentences, tables and sections, and the numbers behind them."""
