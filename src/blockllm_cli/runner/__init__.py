"""The only assembler: from a recipe to objects, through the loop, to a run folder."""
