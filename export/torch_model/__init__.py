"""A transformers model as the source of an export: the original in torch.

original  the origin of an export         source   hub, directory or object -> model
adapter   PEFT's, merged                  text     the text part of a model of pictures
"""
