"""The live view (--live): the run's figures on the whole terminal, with keys."""
