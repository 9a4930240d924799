"""What the page asks for, one module for each of its parts; each has a ``router``."""
