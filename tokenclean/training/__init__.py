"""Masked fine-tuning."""
