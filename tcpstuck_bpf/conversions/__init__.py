"""Puts a recording into other forms: a picture, a packet capture."""
