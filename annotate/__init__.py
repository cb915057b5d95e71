"""Where people judge: records, label database, assignment, statistics and the labelling page. No torch."""
