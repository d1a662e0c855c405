"""Adapters: attention of other libraries' models, computed by flashbias; each imports its library when it is used."""
