"""`python -m cluster VERB`: the same as `micacl VERB`."""

from cluster.cli import main

main()
