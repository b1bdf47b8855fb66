"""`trainer export`: weights of a run as a model that other programs read, verified before it is put in place."""
