"""How `fold` works: capture what reads what, plan, rewrite a copy, verify it.

`kinds` says which layers are known, `algebra` what becomes of their weights. `capture` learns the
`flow` of data (by torch.fx; by torch.export, `exported`, where fx cannot); `plan` decides from it
what is folded into what, in which `steps`, and why the rest is not. `rewrite` takes them on any
copy of the model; `verify` runs it on the `example` and refuses what is not the same function;
`report` and `timing` say what came of it.
"""
