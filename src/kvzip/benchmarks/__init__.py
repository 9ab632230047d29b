"""What kvzip costs on a device, beside what people use today: `kvzip bench`.

    suite.py        which sections there are, and how they are run
    records.py      one line of the results
    timing.py       times with a cold cache
    ceilings.py     what the memory and the matrix units of this device can do
    geometries.py   random models in published shapes
    lengths.py      how many pairs each head keeps
    published.py    the published approach, from its description
    targets.py      the figures to reach

The other files are the sections: one an operation, with the stem of its file in `kernels`, and
`decode_step`, `shared_batch`, `read_context` and `sliding_layers`, among others, for whole models.
"""
