"""Ray programs: they decide where, when, how many and what next. What is computed lives in stdit."""
