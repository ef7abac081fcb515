"""Whether an export says what its origin says, and what a precision costs.

check    whether both say the same      corpus   the text for calibration and judging
quality  what a precision costs on text  profile  where a model's time goes
"""
