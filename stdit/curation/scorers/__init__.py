"""Scorers: one file, one function of a clip each (stdit.curation.clips.ClipView -> a number, or several by name).

`VERSION` is raised when the same clip would get another score; clips are then scored again.
"""
