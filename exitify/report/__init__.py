"""The report on an artifact: where it stops, what that costs and saves, and what it rests on. A page, and plots for papers."""
