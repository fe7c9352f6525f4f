"""What `diagnose` looks at, one concern a file.

`modes` switches layers between the batch's statistics and the running ones; `watch` sees what comes
into them; `gap` compares the outputs; `statistics`, `configuration` and `inputs` judge, each check
a function from what was seen to findings.
"""
