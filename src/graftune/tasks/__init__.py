"""One file per task: columns, head, collator, metrics; and the run that trains it."""
