"""What an artifact holds beside its graphs and weights."""
