"""Training: plan, step, optimizer, schedule, the loop and what it writes."""
