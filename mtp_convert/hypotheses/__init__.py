"""What may have happened to the values of a param, each hypothesis tested on the values; only numpy is needed."""
