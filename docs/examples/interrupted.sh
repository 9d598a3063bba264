# Ends in the search, as Ctrl-C would end it; a report of what there is by then.
timeout -s INT 100 secateur run pipeline/runs/digits.yaml --set threads=1 --set name=digits-interrupted
secateur report digits-interrupted
