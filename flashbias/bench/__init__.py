"""Measurements of the operator beside its peers; every number in the documentation comes from here."""
