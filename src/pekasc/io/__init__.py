"""Readers for data formats (HEST-1k and others come with later releases)."""
