"""What a job will read, hold, compute and write, said beforehand, and what it did, measured.

`make_plan` is arithmetic over a checkpoint's headers, token counts and a method, and imports no torch;
`calibrate` and `measure` are what it is held against.
"""
