"""The loop: prompts are read into a cache, rows step and leave.

model          new ids and a cache -> logits       cache         keys and values, in place
kv_int8        keys and values in 8 bits           prompt_reader in 32, where prompts are read
prefill        prompts -> the cache, by chunks     prefill_int8  many tokens, in 8 bits
session        what the model runs in, opened  cuts          which are read together, how far
prefix_cache   what is kept of prompts for later   request       the rows of one call
batch          THE LOOP: rows join, step, leave    beam/         beam search over the same stages
alike          rows whose tokens are chosen together  step        which kind it was, its new tokens
slots          rows move between a cache's slots
speculative    several tokens a step               guidance      logits without the prompt
prepare        arguments -> one call, checked      call          one call, ready to run
schedule       many people's calls, side by side   plan          which of them are next, in numbers
writer         tokens with their text
score          how likely given tokens are         memory_estimate  what a call would take
output         what comes out
"""
