"""From a GGUF file to a model directory, without torch.

file           metadata and tensors of a file, checked   tensors      its types -> float32
architectures  its names -> a transformers configuration and transformers' tensor names
vocabulary     its tokens, merges and scores -> a tokenizer
parts          all of it, as a graph is built of it
proved         the same, beside what transformers reads of the file
"""
