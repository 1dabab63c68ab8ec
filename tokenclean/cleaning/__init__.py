"""From scores to cleaned pools, and the loop that alternates scoring and training."""
