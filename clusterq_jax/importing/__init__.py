"""Imports networks of torch as graphs.

program        a torch.export program as plain data
pt2_files      reads it from a file, without torch; `tensors` reads its weights
live           reads it from torch's own object
translate      makes layers of its calls; `constants` computes what no image
               changes, `refusals` says why something cannot be imported
passes         rewrite layers until a graph has them
names          names them
network        the whole import
"""
