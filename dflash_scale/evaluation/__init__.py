"""How good a drafter is: decoding written out, a real server, and counts that compare."""
