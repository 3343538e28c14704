"""A recording in other forms: a picture, a packet capture."""
