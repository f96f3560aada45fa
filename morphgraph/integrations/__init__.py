"""Budgets in trainings of which a framework owns the loop: one file per framework.

Nothing here is imported before it is used: ``from morphgraph.integrations.lightning import ...``.
"""
