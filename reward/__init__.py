"""What turns (prompt, completion) into numbers: tokens, log-probs, scores, reward models, measures."""
