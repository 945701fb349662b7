"""Other programs' file formats."""
