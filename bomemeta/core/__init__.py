"""Pure mathematics: torch only. Knows no solver, no problem, no transport."""
