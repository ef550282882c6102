"""Scores under their protocols, intervals and tests, claims: the only place that says better, worse or undecided."""
