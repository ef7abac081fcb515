"""The machine: what it has, what is installed on it, and how it is interrupted.

cpu        cores, memory, and what the processor can   memory     pages given back
extras     what else can be installed                  interrupt  Ctrl-C, and where it ends
"""
