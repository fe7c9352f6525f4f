"""What `diagnose` looks at, one concern a file.

`examination` makes the passes. `modes` switches layers between the batch's statistics and the
running ones; `watch` sees what comes into them, `trace` where it is from; `gap` compares the
outputs; `statistics`, `configuration` and `inputs` judge, each check a function from what was seen
to findings.
"""
