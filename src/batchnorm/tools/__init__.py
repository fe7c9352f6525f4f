"""What acts on a whole model: one tool a file."""
