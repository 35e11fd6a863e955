"""How good a set of videos is: distances between sets, motion error, smoothness."""
