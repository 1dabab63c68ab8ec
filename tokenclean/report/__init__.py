"""What was cleaned, to look at: statistics, figures, pages."""
