"""Mixed poison: how early clients are found that train on harmful answers among ordinary data,
with every source unseen in turn.
"""
