"""Heads and models on disk and on the hub.

heads_folder     save, load and find heads
fingerprint      which base heads belong to
provenance       how a run was made
export           a trained model or adapter as an ordinary checkpoint
hub              push and pull heads
cards            model cards
opening          errors of models that cannot be opened
"""
