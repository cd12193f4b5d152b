"""Damaged and hostile inputs for every reader: `python -m tests.fuzz --count 5000 --seed 1`.

Each input is an undamaged file, option or path with one change, drawn from a seed. What may come out is one of:

- a refusal: a `PpclError` of one line (exit code 2 on the command line);
- the result of the undamaged input;
- where the change makes another valid input (`readers.Reader.free`), a result that belongs to it.

Anything else is a fault: another exception, another result, more than some seconds, more than a gigabyte.
"""
