"""A real study under a seeded schedule of faults: the schedule, who injects it, who runs it."""
