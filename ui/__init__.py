"""The graphical interface."""
