"""A page about one run or several: reading what they left behind, choosing what to draw, and the page itself."""
