"""From facts and budgets to a plan: which channels stay."""
