"""Parameters, buffers, state_dict, repr: thin shells over `functional`."""
