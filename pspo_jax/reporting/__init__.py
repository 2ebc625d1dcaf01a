"""The report page on one or several runs."""
