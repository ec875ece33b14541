"""Code generated from proto/sessionstore/v1 by proto/generate.py. Never edited by hand."""
