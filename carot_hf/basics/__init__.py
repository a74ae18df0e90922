"""What every package may use: text for people, files, precision; knows nothing of CLIP."""
