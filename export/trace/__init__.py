"""A torch model to a graph, by torch's exporter.

graph      model -> graph                   attention  what attention becomes
hooks      models with code of their own    refuse     what no graph can express
states     recurrences and convolutions     experts    mixtures of them
repeat     layers that are alike, once      rope       rotations that change with the length
sparse     attention by an index            stored     weights in their own type until used
"""
