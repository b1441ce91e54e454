"""GSM8K, pass@k."""
