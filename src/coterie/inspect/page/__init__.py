"""The report page: its sentences, tables, sections and data."""
