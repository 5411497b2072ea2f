"""Handovers made visible: in the terminal, as pictures, as one page of HTML."""
