"""Ways in for other libraries and for a user who wants to be sure; each module needs the library of its name."""
