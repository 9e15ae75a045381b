"""STDiTPipeline and what batch generation needs around it."""
