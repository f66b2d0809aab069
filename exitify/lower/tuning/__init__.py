"""Measuring schedules: which kernels there are (tasks), what could be tried (space), how long it takes (measure), what is known (database)."""
