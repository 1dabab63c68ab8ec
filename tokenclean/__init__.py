"""tokenclean: token-level cleaning of supervised fine-tuning data.

Importing the package imports nothing heavy; see the README's file map for where to start.
"""

__version__ = "0.1.0"
