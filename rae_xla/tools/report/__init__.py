"""HTML report of one or several runs, from their results folders."""
