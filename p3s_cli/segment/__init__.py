"""Points to masks, the way that measures best; the literal recipe of the paper is `paper/points.py`."""
