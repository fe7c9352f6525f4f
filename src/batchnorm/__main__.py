"""Runs the `batchnorm` command as `python -m batchnorm`."""

from batchnorm.cli import main

# Worker processes import this module again, and must not start the command over.
if __name__ == "__main__":
    main()
