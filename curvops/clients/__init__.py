"""Other libraries' and users' ways in."""
