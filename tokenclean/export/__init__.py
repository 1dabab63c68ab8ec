"""Cleaned pools and trained models for other tools."""
