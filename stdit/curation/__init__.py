"""From raw footage to a manifest of clips: analysis, cuts, scores, near-duplicates, captions, the report."""
