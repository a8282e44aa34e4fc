"""Commands about data and checkpoints: `pem check-data`, in a checkout `python scripts/check_data.py`."""
