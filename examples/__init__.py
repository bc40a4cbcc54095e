"""A trained model, and the same flow for real numbers."""
